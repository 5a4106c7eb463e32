"""`parloop serve` without vLLM: transformers' own server (`transformers serve`) around one PLT, at any loop count.

It answers one request after another, with `generate()`. What had to change in that server is in fallback_server.py.
"""

import argparse
import contextlib
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.import_utils import is_serve_available
from transformers.utils.logging import log_levels

from ..errors import CheckpointError, ServeError
from ..generate import DTYPES, load_config, usable_device


def serve_with_transformers(
    checkpoint: str,
    *,
    num_loops: int | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    device: str = "auto",
    arguments: Sequence[str] = (),
) -> None:
    """Serve a PLT with transformers' server, until it is interrupted.

    Args:
        checkpoint: folder or Hub name.
        num_loops: R, the loop count of all answers. Default: the checkpoint's.
        name: what clients call the model. Default: `NAME@R`, with the folder's or the Hub's name. NAME alone and `checkpoint` are
            answered too; every other name is an error.
        host: address to listen at.
        port: port to listen at.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: auto (a GPU if there is one), cpu, cuda, ...
        arguments: options of `transformers serve`, see `server_options`.

    Raises:
        ServeError: an option that is unknown or does not work with a PLT, a package that is missing, a port in use.
        CheckpointError: the checkpoint cannot be loaded, as in `load_model`.
    """
    if num_loops is not None and (type(num_loops) is not int or num_loops < 1):
        raise ServeError(f"num_loops={num_loops!r} must be an integer of at least 1.")
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}.")
    options = server_options(arguments)
    if not is_serve_available():
        raise ServeError('transformers\' server needs more packages: pip install "transformers[serving]".')
    _check_port(host, port)
    device = usable_device(device)
    config = load_config(checkpoint)
    loops = num_loops or config.plt_num_loops
    names = model_names(checkpoint, loops, name)

    import uvicorn

    from .fallback_server import build_app

    try:
        app = build_app(checkpoint, names, loops, dtype=dtype, device=device, **options)
    except ImportError as error:  # bitsandbytes, flash-attn, or a part of the server that moved
        raise ServeError(f"the server cannot be started: {error}") from error
    with contextlib.suppress(KeyboardInterrupt):  # how a server ends
        uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="info")).run()


def model_names(checkpoint: str, loops: int, name: str | None = None) -> list[str]:
    """What the model answers to: its name, the name without `@R`, and the checkpoint as given and in full."""
    folder = Path(checkpoint)
    name = name or f"{folder.resolve().name if folder.is_dir() else checkpoint}@{loops}"
    names = [name, re.sub(r"@\d+$", "", name), checkpoint]
    if folder.is_dir():
        names.append(str(folder.resolve()))
    return list(dict.fromkeys(names))


def server_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `transformers serve` that a PLT can be served with, parsed.

    Raises:
        ServeError: another option, or a value that does not fit.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--attn-implementation", default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quantization", choices=("bnb-4bit", "bnb-8bit"), default=None)
    parser.add_argument("--reasoning", choices=("on", "off", "auto"), default="auto")
    parser.add_argument("--chat-template-kwargs", default=None)
    parser.add_argument("--decision-config", default=None)
    parser.add_argument("--enable-cors", action="store_true")
    parser.add_argument("--log-level", choices=tuple(log_levels), default="warning")
    parser.add_argument("--default-seed", type=int, default=None)
    known, unknown = parser.parse_known_args(list(arguments))
    if paged := [argument for argument in unknown if re.match(r"--(continuous-batching|cb-)", argument)]:
        raise ServeError(
            f"{paged[0]} does not work with a PLT: transformers' paged cache holds keys and values only, and not the state "
            f"that a PLT carries from token to token. Leave it out, or serve with vLLM, which batches."
        )
    if parsers := [
        argument for argument in unknown if re.match(r"--(enable-auto-tool-choice|(tool-call|reasoning)-parser)", argument)
    ]:
        raise ServeError(
            f"{parsers[0]} is an option of vLLM. transformers' server needs none: it finds tool calls and reasoning by what the chat "
            f"template shows. Leave it out."
        )
    if unknown:
        allowed = ", ".join(action.option_strings[0] for action in parser._actions)
        raise ServeError(f"{' '.join(unknown)}: no such option here. Of transformers' server, these can be used: {allowed}.")
    if known.chat_template_kwargs is not None and not _json_object(known.chat_template_kwargs):
        raise ServeError(f"--chat-template-kwargs {known.chat_template_kwargs} must be a JSON object.")
    return vars(known)


def _json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ServeError(f"{message}.")


def _check_port(host: str, port: int) -> None:
    """Before minutes of loading, not after."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServeError(f"host={host!r}, port={port} cannot be listened at ({error}): use another port.") from error
