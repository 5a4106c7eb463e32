"""Costs of an arm's model: time of prefill and decode steps, bytes of cache, memory of a training step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import timer

from ..checkpoints import load_model
from ..model.cache import cache_bytes, make_cache
from ..model.modeling import PLTForCausalLM
from ..timing import LiveBytes, Spread, interleaved
from ..train.recipe import Recipe
from .arms import Arm
from .results import CacheBytes, Costs

ROUNDS = 7


def measure(folders: dict[Arm, Path], recipe: Recipe) -> dict[Arm, Costs]:
    """Return times, cache bytes and training memory of one checkpoint per arm."""
    models = {arm: load_model(folder, recipe.device) for arm, folder in folders.items()}
    times = inference_times(models, recipe.length)
    rows = recipe.batch_size // recipe.gradient_accumulation
    return {
        arm: Costs(
            prompt_tokens=prompt_tokens(recipe.length),
            **times[arm],
            cache_bytes=cache_bytes_of(model, recipe.length),
            peak_training_bytes=peak_training_bytes(model, rows, recipe.length),
        )
        for arm, model in models.items()
    }


def prompt_tokens(length: int) -> int:
    """Return how many tokens of a text of `length` tokens are its prompt; the rest is decoded."""
    return 3 * length // 4


def inference_times(models: dict[Arm, PLTForCausalLM], length: int, rounds: int = ROUNDS) -> dict[Arm, dict[str, Spread]]:
    """Time prefill and both ways of decoding for all models, interleaved, at batch size 1.

    Args:
        models: the arms' models, in eval mode.
        length: tokens of the text.
        rounds: repetitions.

    Returns:
        arm -> prefill_ms, decode_ms (all loops in one pass) and decode_pass_per_loop_ms, in milliseconds, over rounds.
    """
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    variants: dict[tuple[Arm, bool], Callable[[], tuple[float, float]]] = {
        (arm, one_pass): partial(_one_text, model, ids.to(model.device), prompt_tokens(length), one_pass)
        for arm, model in models.items()
        for one_pass in (True, False)
    }
    measured = interleaved(variants, rounds)
    return {
        arm: {
            "prefill_ms": Spread.of([1e3 * prefill for prefill, _ in measured[arm, True]]),
            "decode_ms": Spread.of([1e3 * decode for _, decode in measured[arm, True]]),
            "decode_pass_per_loop_ms": Spread.of([1e3 * decode for _, decode in measured[arm, False]]),
        }
        for arm in models
    }


@torch.no_grad()
def _one_text(model: PLTForCausalLM, ids: torch.Tensor, prompt: int, one_pass: bool) -> tuple[float, float]:
    """Return the seconds of the prefill of `prompt` tokens, and the seconds per decode step over the rest."""
    cache = make_cache(model.config)
    start = timer()
    model(ids[:, :prompt], cache=cache, logits_to_keep=1, output_loop_states=False)
    after_prefill = timer()
    for t in range(prompt, ids.shape[1]):
        model(ids[:, t : t + 1], cache=cache, one_pass=one_pass, output_loop_states=False)
    return after_prefill - start, (timer() - after_prefill) / (ids.shape[1] - prompt)


@torch.no_grad()
def cache_bytes_of(model: PLTForCausalLM, length: int) -> CacheBytes:
    """Measure the bytes of a cache, on texts of `length` tokens and of half as many."""
    held = []
    for tokens in (length // 2, length):
        cache = make_cache(model.config)
        model(torch.full((1, tokens), 3, device=model.device), cache=cache, output_loop_states=False)
        held.append(cache_bytes(cache))
    grown = held[1]["full"] - held[0]["full"]
    return CacheBytes(per_token=grown / (length - length // 2), fixed=held[1]["window"] + held[1]["carry"])


def peak_training_bytes(model: PLTForCausalLM, batch_size: int, length: int) -> int:
    """Measure the peak bytes of live tensors in a forward and backward pass, weights and gradients included.

    On a GPU this is the allocator's own peak, otherwise the storages alive between operations.
    """
    model.train()
    batch = torch.full((batch_size, length), 3, device=model.device)
    weights = sum(p.nbytes for p in model.parameters())
    model.zero_grad(set_to_none=True)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(batch, labels=batch).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes(ignored=model.parameters()) as live:
            model(batch, labels=batch).loss.backward()
        peak = live.peak
    model.zero_grad(set_to_none=True)
    model.eval()
    return weights + peak
