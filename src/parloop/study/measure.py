"""What a loop count costs: time of prefill and decode steps, bytes of cache, memory of a training step."""

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..model.cache import cache_bytes, make_cache
from ..model.modeling import PLTForCausalLM


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def _one_text(model: PLTForCausalLM, ids: torch.Tensor, prompt: int, one_pass: bool) -> tuple[float, float]:
    """Seconds of the prefill of `prompt` tokens, and per decode step over the rest."""
    cache = make_cache(model.config)
    start = _now(model.device)
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1, output_loop_states=False)
    after_prefill = _now(model.device)
    for t in range(prompt, ids.shape[1]):
        model(ids[:, t : t + 1], past_key_values=cache, one_pass=one_pass, output_loop_states=False)
    steps = ids.shape[1] - prompt
    return after_prefill - start, (_now(model.device) - after_prefill) / steps


def inference_times(
    models: dict[int, PLTForCausalLM], length: int, repeats: int = 7, on_round: Callable[[], None] | None = None
) -> dict[int, dict[str, Any]]:
    """Batch 1, models and ways of decoding interleaved, one round of warm-up.

    Args:
        models: loop count -> model in eval mode.
        length: tokens of the text; three quarters of it are the prompt.

    Returns:
        loop count -> medians over rounds: prefill_ms, decode_ms (all loops in one pass), decode_pass_per_loop_ms, each with
        its quartiles under NAME_quartiles; and prompt_tokens.
    """
    prompt = 3 * length // 4
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    times: dict[int, dict[str, list[float]]] = {
        loops: {"prefill_ms": [], "decode_ms": [], "decode_pass_per_loop_ms": []} for loops in models
    }
    for round_ in range(repeats + 1):
        for loops, model in models.items():
            here = ids.to(model.device)
            prefill, decode = _one_text(model, here, prompt, one_pass=True)
            _, sequential = _one_text(model, here, prompt, one_pass=False)
            if round_:
                times[loops]["prefill_ms"].append(1e3 * prefill)
                times[loops]["decode_ms"].append(1e3 * decode)
                times[loops]["decode_pass_per_loop_ms"].append(1e3 * sequential)
        if on_round:
            on_round()
    result: dict[int, dict[str, Any]] = {}
    for loops, measured in times.items():
        result[loops] = {"prompt_tokens": prompt}
        for name, values in measured.items():
            low, middle, high = statistics.quantiles(values, n=4)
            result[loops] |= {name: middle, f"{name}_quartiles": [low, high]}
    return result


@torch.no_grad()
def cache_bytes_of(model: PLTForCausalLM, length: int) -> dict[str, float]:
    """Bytes per token that grow with the text, and bytes that do not, measured on a text of `length` tokens."""
    held = []
    for tokens in (length // 2, length):
        cache = make_cache(model.config)
        model(torch.full((1, tokens), 3, device=model.device), past_key_values=cache, output_loop_states=False)
        held.append(cache_bytes(cache))
    grown = held[1]["full"] - held[0]["full"]
    return {"per_token": grown / (length - length // 2), "fixed": held[1]["window"] + held[1]["carry"]}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive after every operation, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def peak_training_bytes(model: PLTForCausalLM, batch_size: int, length: int) -> int:
    """Most bytes of tensors alive at once in a forward and backward pass, weights and gradients included.

    On a GPU the allocator's own peak, else the storages alive between operations.
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
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        with LiveBytes() as live:
            live.known |= known
            model(batch, labels=batch).loss.backward()
        peak = live.peak
    model.zero_grad(set_to_none=True)
    model.eval()
    return weights + peak
