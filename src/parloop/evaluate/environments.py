"""A Python environment for every tool, made once and kept: pinned packages, installed without their declared dependencies.

The lists in `requirements/` were found by running the tools: declared dependencies are often more than a tool uses, or in conflict.
"""

import hashlib
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ..corpus.cache import cache_folder, default_cache
from ..errors import EvaluationError
from .benchmark import Environment

HERE = Path(__file__).parent
READY = "ready"
PYTHONS = [(3, minor) for minor in range(11, 16)]


def requirements(environment: Environment) -> Path:
    """Return the file with an environment's packages and versions."""
    return HERE / "requirements" / f"{environment.name}.txt"


def folder_of(environment: Environment) -> Path:
    """Return the environment's folder in the cache, whether it exists or not.

    Another list of packages has another folder.
    """
    return default_cache() / "evaluate" / _name_of(environment)


def _name_of(environment: Environment) -> str:
    what = requirements(environment).read_bytes() + repr((environment.with_ours, sys.version_info[:2])).encode()
    return f"{environment.name}-{hashlib.sha256(what).hexdigest()[:12]}"


def interpreter(environment: Environment) -> tuple[str, tuple[int, int]] | None:
    """Return a Python for the tool, and its version: the one that its packages were chosen on, or else the next newer
    one; None if there is none here."""
    if environment.with_ours:
        return sys.executable, environment.python
    for version in PYTHONS:
        if version == sys.version_info[:2] and version >= environment.python:
            return sys.executable, version
        if version >= environment.python and (found := shutil.which("python{}.{}".format(*version))):
            done = subprocess.run([found, "-c", "import venv"], capture_output=True)
            if not done.returncode:  # version managers leave commands for versions that are not installed
                return found, version
    return None


def make(environment: Environment, console: Console) -> Path:
    """Return the folder of the environment's programs; the environment is made if it does not exist.

    Raises:
        EvaluationError: there is no Python for it, or a package cannot be installed.
    """
    folder = folder_of(environment)
    if (folder / READY).exists():
        return folder / "bin"
    found, needed = interpreter(environment), "{}.{}".format(*environment.python)
    if found is None:
        raise EvaluationError(
            f"{environment.name} needs Python {needed} or newer, and python{needed} is not on the path: install it."
        )
    python, version = found
    if version != environment.python:
        console.print(
            "{}'s packages were chosen on Python {}; on {}.{} some may not install or work.".format(environment.name, needed, *version),
            style="yellow", markup=False, highlight=False,
        )  # fmt: skip
    folder = cache_folder("evaluate", console, default_cache()) / folder.name
    if (folder / READY).exists():  # in a temporary cache
        return folder / "bin"
    with console.status(f"installing {environment.name} into {folder} (once, a minute or two)"):
        # Environments cannot be moved, so this one is made in its final folder, and a file marks it as complete.
        shutil.rmtree(folder, ignore_errors=True)
        _run([python, "-m", "venv", str(folder)], environment)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", "-r", str(requirements(environment))], environment)
        if environment.with_ours:
            _see_ours(folder)
    (folder / READY).write_text("", encoding="utf-8")
    return folder / "bin"


def _see_ours(folder: Path) -> None:
    """Let an environment import the packages of the running one, after its own."""
    folders = [
        found
        for found in (*site.getsitepackages(), *(p for p in sys.path if p.endswith("site-packages")))
        if Path(found).is_dir()
    ]
    source = str(HERE.parents[1])  # a source tree that is only on PYTHONPATH
    lines = [f"import site; site.addsitedir({found!r})" for found in dict.fromkeys(folders)]
    (target,) = (folder / "lib").glob("python*/site-packages")
    (target / "parloop-ours.pth").write_text(
        "\n".join([*lines, source]) + "\n", encoding="locale"
    )  # Python reads .pth files in this encoding


def _run(command: list[str], environment: Environment) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise EvaluationError(
            f"the environment of {environment.name} cannot be made: {' '.join(command)} ended with {done.returncode}:\n{last}\n"
            f"Check the connection and the disk, and run the same command again."
        )
