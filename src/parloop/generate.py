"""Loading a checkpoint, and streaming text from it to the terminal."""

import bisect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .errors import CheckpointError
from .model.configuration import PLTConfig

OPENING, CLOSING = "<think>", "</think>"
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
        think_budget: tokens of reasoning, after which it is closed; see `closing_reasoning`.

    Raises:
        CheckpointError: as `load_model`; also for options out of their bounds and prompts that are too long or empty.
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
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p}
    if think_budget is not None:
        sampling["prefix_allowed_tokens_fn"] = closing_reasoning(think_budget, tokenizer, model.config.vocab_size)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=min(max_new_tokens, room),
        num_loops=loops,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


def closing_reasoning(budget: int, tokenizer: Any, vocab_size: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Close reasoning after `budget` tokens of it: what `generate(prefix_allowed_tokens_fn=..)` takes.

    Reasoning is what follows <think>, which the model writes or the prompt ends with, up to </think>. A model that has not closed it when
    the budget is used up can go on with nothing but the tokens of </think> and an empty line; then it writes its answer. The temperature
    and everything else of generation are as they are.

    Args:
        budget: in tokens, those of the tags not counted.
        vocab_size: rows of the model's embedding.
    """
    anything = torch.arange(vocab_size)
    closing = torch.tensor(tokenizer(f"\n{CLOSING}\n\n", add_special_tokens=False)["input_ids"])

    def allowed(row: int, ids_T: torch.Tensor) -> torch.Tensor:
        ids = ids_T.tolist()
        openings = tokenizer.decode(ids).count(OPENING)
        if not openings:
            return anything
        # The tags may be several tokens each, which join with their neighbours: text is what shows them.
        begin = bisect.bisect_left(range(len(ids) + 1), openings, key=lambda n: tokenizer.decode(ids[:n]).count(OPENING))
        beyond = len(ids) - begin - budget
        if not 0 <= beyond < len(closing) or CLOSING in tokenizer.decode(ids[begin : begin + budget]):
            return anything
        return closing[beyond : beyond + 1]

    return allowed
