"""Stream text from a checkpoint to the terminal."""

import math
import sys
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from .checkpoints import load_model, load_part
from .errors import CheckpointError, first_line
from .record import printable

GREEDY_BELOW = 1e-5  # of temperatures, as in vLLM: what is divided by less may overflow


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
    """Print the prompt and its continuation, token by token.

    Raises:
        CheckpointError: as `load_model`; also for options out of their bounds and prompts that are too long or empty.
    """
    for name, value, allowed, what in (
        ("loops", loops, loops is None or loops >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a number from 0; 0 takes the likeliest token"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1; 1 samples among all tokens"),
        ("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2**63"),
    ):
        if not allowed:
            raise CheckpointError(f"{name}={value} must be {what}.")
    if printable(prompt) != prompt:
        raise CheckpointError(f"the prompt {printable(prompt)[:40]!r} has bytes that are not UTF-8: give it as UTF-8.")
    model = load_model(checkpoint, device, dtype)
    tokenizer = load_part(AutoTokenizer, checkpoint, "tokenizer (tokenizer.json)")
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].shape[1]:
        raise CheckpointError(
            "the prompt is empty, and this tokenizer begins texts with no token of its own: give a prompt."
        )
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
    # One sequence: a checkpoint's own settings may ask for beams, which cannot be streamed.
    sampling: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "do_sample": temperature >= GREEDY_BELOW}
    if sampling["do_sample"]:
        sampling |= {"temperature": temperature, "top_p": top_p}
    try:
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(max_new_tokens, room),
            num_loops=loops,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {str(checkpoint)!r} cannot generate ({first_line(error)}): see its generation_config.json."
        ) from error
