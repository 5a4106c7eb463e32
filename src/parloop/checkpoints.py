"""Load PLT checkpoints: configuration, model, tokenizer, files."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from .errors import CheckpointError
from .model.configuration import PLTConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_config(checkpoint: str | Path) -> PLTConfig:
    """The configuration of a PLT checkpoint, a folder or Hub name.

    Raises:
        CheckpointError: there is none, or it is another architecture.
    """
    config = load_part(AutoConfig, checkpoint, "config.json")
    if not isinstance(config, PLTConfig):
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} has model_type {config.model_type!r}, not {PLTConfig.model_type!r}: not a PLT."
        )
    return config


def load_model(checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> Any:
    """A PLT checkpoint in eval mode.

    Args:
        checkpoint: folder or Hub name.
        device: auto (a GPU if there is one), cpu, cuda, ...
        dtype: auto (as saved), float32, bfloat16 or float16.

    Raises:
        CheckpointError: there is none, it is another architecture, or there is no such device or dtype.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}.")
    device = usable_device(device)
    load_config(checkpoint)
    model = load_part(AutoModelForCausalLM, checkpoint, "weights (model.safetensors)", dtype=dtype)
    return model.to(device).eval()


def usable_device(device: str) -> str:
    """The device to use; of auto, a GPU if there is one.

    Raises:
        CheckpointError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # without CUDA torch asserts
        raise CheckpointError(f"device={device!r} is not there ({_first_line(error)}): use cpu or auto.") from error
    return device


def load_part(kind: Any, checkpoint: str | Path, part: str, **options: Any) -> Any:
    """`kind.from_pretrained(checkpoint)`, with errors that say what is missing."""
    folder = Path(checkpoint)
    elsewhere = "give the folder of a finished run, for instance runs/study-quick/r2-seed0, or OWNER/NAME of the Hub"
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or ".." in folder.parts):
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} cannot be loaded: there is no such folder; {elsewhere}.")
    try:
        return kind.from_pretrained(checkpoint, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if folder.is_dir():
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} cannot be loaded: the folder has no usable {part} ({_first_line(error)}). If a run "
                f"was interrupted there, finish it; else {elsewhere}."
            ) from error
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot be loaded: there is no such folder here, and the Hub gave no {part} of that name "
            f"({_first_line(error)}); {elsewhere}."
        ) from error


def local_folder(checkpoint: str | Path) -> Path:
    """The folder with a checkpoint's files; of a Hub name, its files in the cache, downloaded if they are not there.

    Raises:
        CheckpointError: there is none.
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
            f"({_first_line(error)})."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".:") or type(error).__name__
