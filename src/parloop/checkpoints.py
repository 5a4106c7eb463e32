"""Load PLT checkpoints: configuration, model, tokenizer, files. A checkpoint whose weights do not match its configuration is refused."""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_accelerate_available

from .errors import CheckpointError, ParloopError, first_line
from .model.configuration import PLTConfig
from .record import printable

WEIGHTS = "weights (model.safetensors)"
DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


def load_config(checkpoint: str | Path) -> PLTConfig:
    """Return the configuration of a PLT checkpoint, a folder or Hub name.

    Raises:
        CheckpointError: there is no such checkpoint, or it has another architecture.
    """
    config = load_part(AutoConfig, checkpoint, "config.json")
    if not isinstance(config, PLTConfig):
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has model_type {config.model_type!r}, not {PLTConfig.model_type!r}: not a PLT."
        )
    return config


def load_model(checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> Any:
    """Return the model of a PLT checkpoint, in eval mode.

    Args:
        checkpoint: folder or Hub name.
        device: auto (a GPU if there is one), cpu, cuda, ...
        dtype: auto (as saved), float32, bfloat16 or float16.

    Raises:
        CheckpointError: there is no such checkpoint, device or dtype, or the checkpoint has another architecture.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}.")
    device = usable_device(device)
    load_config(checkpoint)
    model = load_part(AutoModelForCausalLM, checkpoint, WEIGHTS, dtype=dtype)
    return model.to(device).eval()


def check_weights(checkpoint: str | Path) -> None:
    """Check that the names and shapes of a checkpoint's weights match its config.json. Their values are not read, if accelerate is installed.

    Of quantised checkpoints only those in the form of `parloop quantize` are checked.

    Raises:
        CheckpointError: they do not, or cannot be read.
    """
    from .quantize.form import Scheme

    config = load_config(checkpoint)
    others = [name for name in ("quantization_config", "quantization") if hasattr(config, name)]  # the latter is MLX's
    if not others or Scheme.of(getattr(config, "quantization_config", None)) is not None:
        # Without accelerate the library loads to no device but the CPU: then values are read too, and take memory.
        where = {"device_map": "meta"} if is_accelerate_available() else {}
        load_part(AutoModelForCausalLM, checkpoint, WEIGHTS, **where)


def usable_device(device: str) -> str:
    """Return the device to use; for auto, a GPU if there is one.

    Raises:
        CheckpointError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise CheckpointError(f"device={device!r} is not available ({first_line(error)}): use cpu or auto.") from error
    if torch.device(device).type == "meta":
        raise CheckpointError(f"device={device!r} holds no values: use cpu or auto.")
    return device


def load_part(kind: Any, checkpoint: str | Path, part: str, **options: Any) -> Any:
    """Return `kind.from_pretrained(checkpoint)`, with errors that name what is missing.

    A model's files must hold exactly the weights of its config.json. transformers would initialise missing ones at random, and ignore layers
    beyond num_hidden_layers.

    Args:
        kind: an auto class of transformers.
        checkpoint: folder or Hub name.
        part: name of the part in error messages.
        **options: keyword arguments of from_pretrained.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be loaded.
    """
    folder = Path(checkpoint)
    elsewhere = "give the folder of a finished run, for instance runs/study-quick/r2-seed0, or OWNER/NAME of the Hub"
    if printable(checkpoint) != str(checkpoint):
        raise CheckpointError(
            f"checkpoint {printable(checkpoint)!r} has bytes in its name that are not UTF-8, and weights cannot be read from there: rename it."
        )
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or ".." in folder.parts):
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} cannot be loaded: there is no such folder; {elsewhere}.")
    try:
        if kind is AutoModelForCausalLM:
            return _load_whole(checkpoint, **options)
        return kind.from_pretrained(checkpoint, **options)
    except ParloopError:
        raise
    except ImportError as error:  # bitsandbytes, flash-attn: nothing is wrong with the files
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} cannot be loaded: {first_line(error)}.") from error
    except Exception as error:  # transformers raises a dozen kinds for files of a wrong form
        if folder.is_dir():
            reason = _no_json_object(folder, TOKENIZER_FILES if kind is AutoTokenizer else MODEL_FILES) or first_line(error)
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} cannot be loaded: the folder has no usable {part} ({reason}). If a run "
                f"was interrupted there, finish it; otherwise {elsewhere}."
            ) from error
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded: there is no such folder here, and the Hub gave no {part} of that name "
            f"({first_line(error)}); {elsewhere}."
        ) from error


def _load_whole(checkpoint: str | Path, **options: Any) -> Any:
    """Load a model, and check that its weights match config.json.

    Raises:
        CheckpointError: weights are missing, surplus, or of another shape.
        ValueError: generation_config.json is not JSON; transformers would ignore it, and not know where a text ends.
    """
    if reason := _no_json_object(Path(checkpoint), ("generation_config.json",)):
        raise ValueError(reason)
    with _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    model, found = loaded
    refuse_other_weights(checkpoint, model.config, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    if model.config.tie_word_embeddings:
        head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
        if head is not embedding and not head.is_meta:  # transformers ties equal tensors
            raise other_head(checkpoint)
    return model


def refuse_other_weights(
    checkpoint: str | Path,
    config: PLTConfig,
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, Any, Any]],
) -> None:
    """Raise if a checkpoint's weights do not match its config.json.

    Args:
        checkpoint: folder or Hub name, for messages.
        config: its configuration.
        missing: names of missing weights.
        unexpected: names of surplus weights, without the gates of a looped checkpoint that is loaded with one loop.
        mismatched: names, with the shapes in the files and by config.json.

    Raises:
        CheckpointError: one of the three is not empty.
    """
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    mismatch = f"checkpoint {str(checkpoint)!r} does not match its config.json:"
    layers = 1 + max((int(found[1]) for name in unexpected if (found := re.search(r"\.layers\.(\d+)\.", name))), default=-1)
    if layers > config.num_hidden_layers:
        raise CheckpointError(
            f"{mismatch} the files hold {layers} layers, and num_hidden_layers={config.num_hidden_layers} would leave the last ones out: "
            f"correct it."
        )
    if mismatched:
        name, held, asked = mismatched[0]
        raise CheckpointError(
            f"{mismatch} {name} has shape {tuple(held)}, and not {tuple(asked)}{_more(mismatched)}: correct it, or take the files that "
            f"belong to it."
        )
    if missing:
        raise CheckpointError(
            f"{mismatch} the files lack {missing[0]}{_more(missing)}, which would be random numbers: correct it, or take the files that belong "
            f"to it."
        )
    if unexpected:
        raise CheckpointError(
            f"{mismatch} the files hold {unexpected[0]}{_more(unexpected)}, which a model of this configuration does not have: correct it, or "
            f"take the files that belong to it."
        )


def other_head(checkpoint: str | Path) -> CheckpointError:
    """Return the error for a checkpoint whose head should be tied to the embedding, but differs from it."""
    return CheckpointError(
        f"checkpoint {str(checkpoint)!r} does not match its config.json: tie_word_embeddings is true, but lm_head.weight and "
        f"model.embed_tokens.weight differ: set it to false."
    )


def _more(things: list[Any]) -> str:
    return f" and {len(things) - 1} more" if len(things) > 1 else ""


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of missing and surplus weights, which errors report instead."""

    def is_other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or "CONVERSION" in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _no_json_object(folder: Path, names: Iterable[str]) -> str:
    """Return which of these files exists and does not hold a JSON object; empty if there is none."""
    for name in names:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except RecursionError:
            return f"{name} is nested too deeply"
        except (OSError, ValueError) as error:
            return f"{name} is not JSON: {first_line(error)}"
        if not isinstance(content, dict):
            return f"{name} holds no JSON object"
    return ""


def local_folder(checkpoint: str | Path) -> Path:
    """Return the folder with a checkpoint's files; for a Hub name, its files in the cache, downloaded if needed.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(checkpoint), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"])
        )
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded: there is no such folder here, and the Hub did not give it "
            f"({first_line(error)})."
        ) from error
