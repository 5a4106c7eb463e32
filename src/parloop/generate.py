"""Stream text from a checkpoint to the terminal."""

import bisect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from .checkpoints import load_model, load_part
from .errors import CheckpointError, first_line
from .record import printable

GREEDY_BELOW = 1e-5  # temperature below which decoding is greedy, as in vLLM: division by less may overflow

OPENING, CLOSING = "<think>", "</think>"


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
    think_budget: int | None = None,
) -> None:
    """Print the prompt and its continuation, token by token.

    Args:
        checkpoint: folder or Hub name.
        prompt: text to continue.
        loops: loop count; default: the trained one.
        max_new_tokens: length of the continuation, in tokens.
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that make up this probability.
        seed: seed of the sampling.
        device: auto, cpu or cuda.
        dtype: auto (as saved), float32, bfloat16 or float16.
        think_budget: tokens of reasoning, after which it is closed; see `closing_reasoning`.

    Raises:
        CheckpointError: as `load_model`; also if an option is out of its bounds, or the prompt is too long or empty.
    """
    for name, value, allowed, what in (
        ("loops", loops, loops is None or loops >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a number from 0; 0 takes the likeliest token"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1; 1 samples among all tokens"),
        ("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2**63"),
        ("think_budget", think_budget, think_budget is None or think_budget >= 0, "at least 0, in tokens"),
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
            "the prompt is empty, and this tokenizer adds no token at the beginning of a text: give a prompt."
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
    # One sequence: a checkpoint's own settings may use beams, which cannot be streamed.
    sampling: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "do_sample": temperature >= GREEDY_BELOW}
    if sampling["do_sample"]:
        sampling |= {"temperature": temperature, "top_p": top_p}
    if think_budget is not None:
        sampling["prefix_allowed_tokens_fn"] = closing_reasoning(think_budget, tokenizer, model.config.vocab_size)
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


def closing_reasoning(budget: int, tokenizer: Any, vocab_size: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Return a function for `generate(prefix_allowed_tokens_fn=..)` that closes reasoning after `budget` tokens.

    Reasoning is the text after <think>, which the model writes or the prompt ends with, up to </think>. If the model has not closed it within
    the budget, only the tokens of </think> and an empty line are allowed next; then the model writes its answer. Temperature and all other
    settings of generation keep their effect.

    Args:
        budget: tokens of reasoning, without the tags.
        tokenizer: the model's tokenizer.
        vocab_size: number of rows of the model's embedding.
    """
    anything = torch.arange(vocab_size)
    closing = torch.tensor(tokenizer(f"\n{CLOSING}\n\n", add_special_tokens=False)["input_ids"])

    def allowed(row: int, ids_T: torch.Tensor) -> torch.Tensor:
        ids = ids_T.tolist()
        openings = tokenizer.decode(ids).count(OPENING)
        if not openings:
            return anything
        # A tag may be several tokens, merged with their neighbours, so it is searched for in the text.
        begin = bisect.bisect_left(range(len(ids) + 1), openings, key=lambda n: tokenizer.decode(ids[:n]).count(OPENING))
        beyond = len(ids) - begin - budget
        if not 0 <= beyond < len(closing) or CLOSING in tokenizer.decode(ids[begin : begin + budget]):
            return anything
        return closing[beyond : beyond + 1]

    return allowed
