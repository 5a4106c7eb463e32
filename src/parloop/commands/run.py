"""`parloop run`."""

import importlib.util
import os
import runpy
import sys
from typing import Annotated

from cyclopts import Parameter

from ..errors import ParloopError


def run(
    module: Annotated[str, Parameter(name=["-m", "--module"])],
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
) -> None:
    """Run any Python module that loads models by name, with PLT registered.

    Example: parloop run -m lm_eval --model hf --model_args pretrained=CHECKPOINT --tasks TASK

    With mlx-lm: parloop run -m mlx_lm generate --model CHECKPOINT --prompt "def "

    Parameters
    ----------
    module
        The module, as after `python -m`.
    arguments
        Its arguments.
    """
    sys.path.insert(0, os.getcwd())  # as python -m does
    if not _can_run(module):
        raise ParloopError(
            f"there is no module {module!r} that can be run: give one as after python -m, installed or in this folder."
        )
    from ..export.mlx import register

    register()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _can_run(module: str) -> bool:
    """Return whether there is such a module, or a package with a __main__. (Errors inside it are left to it.)"""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    except (ValueError, ImportError):  # not a module's name
        return False
    return found is not None
