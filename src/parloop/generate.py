"""Loading a checkpoint, and streaming text from it to the terminal."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .model.configuration import PLTConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded, with what to do."""


def load_config(checkpoint: str | Path) -> PLTConfig:
    """The configuration of a PLT checkpoint, a folder or Hub name.

    Raises:
        CheckpointError: there is none, or it is another architecture.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} cannot be loaded: {error}") from error
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
        CheckpointError: there is none, or it is another architecture.
    """
    load_config(checkpoint)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    return model.to(device).eval()


def stream(
    checkpoint: str,
    prompt: str,
    loops: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Print the prompt and its continuation, token by token."""
    model, tokenizer = load_model(checkpoint, device, dtype), AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    if room < 1:
        raise CheckpointError(
            f"the prompt has {inputs['input_ids'].shape[1]} tokens, but the model was made for "
            f"{model.config.max_position_embeddings}: shorten it."
        )
    if max_new_tokens > room:
        print(
            f"(stopping after {room} tokens: the model was made for texts of {model.config.max_position_embeddings})",
            file=sys.stderr,
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        num_loops=loops,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
