"""`parloop serve` without vLLM: options and start of the server. The server itself is in fallback_server.py."""

import argparse
import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from ..checkpoints import DTYPES, WEIGHTS, load_part, usable_device
from ..errors import CheckpointError, ServeError

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "bnb-4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bnb-8bit": {"load_in_8bit": True},
}


def serve_with_transformers(checkpoint: str, loops: int, names: Sequence[str], arguments: Sequence[str] = ()) -> None:
    """Serve a PLT with transformers, one request after another, until it is interrupted.

    Args:
        checkpoint: folder or Hub name.
        loops: R, the loop count of all answers.
        names: names that clients may use for the model; the first is in the answers.
        arguments: options, see `parse_options`.

    Raises:
        ServeError: an option is unknown or has a bad value, a package is missing, or the port is in use.
        CheckpointError: the checkpoint cannot be loaded, as in `load_model`.
    """
    options = parse_options(arguments)
    try:
        import uvicorn

        from .fallback_server import Served, build_app
    except ImportError as error:
        raise ServeError(f'the server needs more packages ({error}): pip install "parloop[serve]".') from error
    _check_port(options.host, options.port)
    logging.get_logger("transformers").setLevel(logging.log_levels[options.log_level])
    model, tokenizer = load(checkpoint, loops, options)
    names = options.served_model_name or names
    app = build_app(Served(model, tokenizer, names, options.compile, options.chat_template_kwargs))
    with contextlib.suppress(KeyboardInterrupt):  # the usual end of a server
        uvicorn.Server(uvicorn.Config(app, host=options.host, port=options.port)).run()


def load(checkpoint: str, loops: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model at a loop count, and its tokenizer. Raises as `serve_with_transformers`."""
    more = {"dtype": options.dtype, "device_map": options.device, "attn_implementation": options.attn_implementation}
    if options.quantization:
        more["quantization_config"] = BitsAndBytesConfig(**QUANTIZATIONS[options.quantization])
    tokenizer = load_part(AutoTokenizer, checkpoint, "tokenizer (tokenizer.json)")
    model = load_part(AutoModelForCausalLM, checkpoint, WEIGHTS, **more)
    # The same as num_loops in every call. Set after loading, since the count at loading decides whether gates are created.
    model.config.plt_num_loops = loops
    return model, tokenizer


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options of this server. Options that `transformers serve` has too have the same names.

    Raises:
        ServeError: an option is unknown, or its value is invalid.
        CheckpointError: there is no such dtype or device.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--quantization", choices=tuple(QUANTIZATIONS))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--chat-template-kwargs", type=_json_object)
    parser.add_argument("--log-level", choices=tuple(logging.log_levels), default="warning")
    try:
        known, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ServeError(f"{error}.") from error
    if unknown:
        allowed = ", ".join("--" + name.replace("_", "-") for name in vars(known))
        raise ServeError(
            f"{' '.join(unknown)}: no such option without vLLM, where tool calls and reasoning are found by the chat template, and "
            f"requests are answered one after another. There are {allowed}."
        )
    if known.dtype not in DTYPES:
        raise CheckpointError(f"dtype={known.dtype!r} is unknown: use one of {', '.join(DTYPES)}.")
    known.device = usable_device(known.device)
    return known


def _json_object(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text[:80]} must be a JSON object")


def _check_port(host: str, port: int) -> None:
    """Check that the port is free, before minutes of loading."""
    try:
        family, *_ = socket.getaddrinfo(host, port)[0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServeError(f"host={host!r}, port={port} is not available ({error}): use another port.") from error
