"""Measurement of one decode or prefill block: times, caches, memory, and the machine's read bandwidth.

Decode steps at a long context need a full cache, but no prefill, since their time does not depend on values. So a cache is filled with
random keys and values, through the library's own `update`, and then has the same layout as after a prefill and a step
(tests/test_bench.py compares the two). Every round of every variant starts from such a fresh cache of the same length.

Axes: B sequences, S tokens, D hidden size, G key/value heads, K head size.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer, timer
from transformers import CompileConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from ..model.cache import cache_bytes, carry_index, make_cache, window_index
from ..model.cache_argument import CACHE
from ..model.configuration import PLTConfig
from ..timing import peak_bytes, reset_peak
from .results import CacheReport
from .variants import PLAIN, Variant


class Run(NamedTuple):
    """Seconds of a prefill, or per decode step; peak bytes of memory; the cache afterwards."""

    seconds: float
    peak_bytes: int
    cache: CacheReport


class Block:
    """Decode steps, or prefills, of all variants at one length and batch size.

    Args:
        models: {"plt": .., "llama": ..}, see models.py.
        tokens: tokens of the prompt, or in the cache when the timed decode steps begin.
        batch_size: sequences at a time.
        steps: number of timed decode steps; 0 for a prefill.
        static: use static caches for all variants, not only for compiled ones.
    """

    def __init__(self, models: dict[str, Any], tokens: int, batch_size: int, steps: int, static: bool):
        self.models, self.tokens, self.steps, self.static = models, tokens, steps, static
        self.batch_size = batch_size
        plt = models["plt"]
        self.config: PLTConfig = plt.config
        generator = torch.Generator(plt.device).manual_seed(0)
        draw: dict[str, Any] = {"generator": generator, "device": plt.device}
        self.ids = torch.randint(self.config.vocab_size, (batch_size, steps + 1 if steps else tokens), **draw)
        if steps:
            shape = (batch_size, self.config.num_key_value_heads, tokens - 1, self.config.head_dim)
            self.k, self.v = (torch.randn(shape, dtype=plt.dtype, **draw) for _ in range(2))  # [B, G, S - 1, K]
            self.carry = torch.randn((batch_size, self.config.hidden_size, 1), dtype=plt.dtype, **draw)  # [B, D, 1]
        self.held: dict[tuple[bool, int], Cache] = {}
        self.calls: dict[Variant, Callable] = {}

    def measure(self, variant: Variant) -> "Run":
        """Run a variant once, from an empty or freshly filled cache."""
        device = self.models["plt"].device
        reset_peak(device)
        elapsed, cache = self.run(variant)
        return Run(elapsed, peak_bytes(device), cache_report(self, variant, cache))

    @torch.no_grad()
    def run(self, variant: Variant) -> tuple[float, Cache]:
        """Return the seconds of the prefill, or per decode step, and the cache afterwards."""
        cache = self._empty_cache(variant)
        if not self.steps:
            start = timer()
            self._call(variant, self.ids, cache, 0)
            return timer() - start, cache
        fill_cache(cache, self.config, variant.loops, self.k, self.v, self.carry)
        # Not timed: the first step may compile, and finds the processor's caches full of the random values.
        self._call(variant, self.ids[:, :1], cache, self.tokens - 1)
        start = timer()
        for step in range(self.steps):
            self._call(variant, self.ids[:, step + 1 : step + 2], cache, self.tokens + step)
        return (timer() - start) / self.steps, cache

    def _call(self, variant: Variant, ids: torch.Tensor, cache: Cache, past: int) -> None:
        model = self.models["llama" if variant.llama else "plt" if variant.weights == PLAIN else variant.weights]
        options: dict[str, Any] = {"logits_to_keep": 1}
        if not variant.llama:
            options |= {"num_loops": variant.loops, "one_pass": variant.one_pass, "exact_tail": variant.tail}
            options["output_loop_states"] = False
        inputs = {"input_ids": ids, CACHE: cache, **options}
        if cache.is_compileable:  # as in generate(): masks are made before the compiled code
            positions = torch.arange(past, past + ids.shape[1], device=ids.device).expand(ids.shape[0], -1).contiguous()
            inputs = model.prepare_inputs_for_generation(
                ids, position_ids=positions, use_cache=True, **{CACHE: cache}, **options
            )
        self._callable(variant, model)(**inputs)

    def _callable(self, variant: Variant, model: Any) -> Callable:
        if not variant.compiled:
            return model
        if variant not in self.calls:
            options = CompileConfig().to_dict()  # the options of generate(): CUDA graphs on a GPU
            if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
                options["isolate_recompiles"] = True  # otherwise every step also checks the code of other variants
            self.calls[variant] = torch.compile(model.__call__, **options)
        return self.calls[variant]

    def _empty_cache(self, variant: Variant) -> Cache:
        """Return the cache that generate() would make. Static ones are kept over rounds, since compiled code keeps their
        addresses."""
        length = self.tokens + self.steps
        llama = self.models["llama"].config if variant.llama else None
        if not (self.static or variant.compiled):
            return DynamicCache(config=llama) if llama else make_cache(self.config, variant.loops)
        key = (variant.llama, variant.loops)
        if key not in self.held:
            cache = StaticCache(llama, length) if llama else make_cache(self.config, variant.loops, length)
            for (
                is_llama,
                _,
            ), other in self.held.items():  # all loop counts share loop 1's keys and values, to save memory
                if not is_llama and not llama:
                    cache.layers[: self.config.num_hidden_layers] = other.layers[: self.config.num_hidden_layers]
            self.held[key] = cache
        self.held[key].reset()
        return self.held[key]


def fill_cache(cache: Cache, config: PLTConfig, loops: int, k: torch.Tensor, v: torch.Tensor, carry: torch.Tensor) -> None:
    """Put S tokens into an empty cache of `loops` loops (1 for a Llama's).

    Args:
        cache: the cache to fill.
        config: configuration of the model.
        loops: its loop count.
        k: keys [B, G, S, K], the same for every layer and loop.
        v: values [B, G, S, K], likewise.
        carry: the last token's state [B, D, 1].
    """
    for layer in range(config.num_hidden_layers):
        cache.update(k.clone(), v.clone(), layer)  # copies: layers must not share memory to read
    for loop in range(1, loops):
        for layer in range(config.num_hidden_layers if config.window_tokens else 0):
            index = window_index(config, loop, layer)
            # The last token separately: a window keeps a view of its last input, which would keep all S tokens alive.
            if k.shape[2] > 1:
                cache.update(k[:, :, :-1], v[:, :, :-1], index)
            cache.update(k[:, :, -1:], v[:, :, -1:], index)
        cache.update_conv_state(carry, carry_index(config, loops, loop - 1), conv_kernel_size=1)


def expected_cache_bytes(
    config: PLTConfig, loops: int, batch_size: int, tokens: int, itemsize: int, static: bool
) -> dict[str, int]:
    """Compute a cache's bytes: L full layers of S tokens, L (R - 1) windows of w tokens (static ones hold one more), R -
    1 carries."""
    token = 2 * batch_size * config.num_key_value_heads * config.head_dim * itemsize  # a key and a value, one layer
    window = min(config.window_tokens + 1 if static and config.window_tokens else config.window_tokens, tokens)
    return {
        "full": config.num_hidden_layers * tokens * token,
        "window": config.num_hidden_layers * (loops - 1) * window * token,
        "carry": (loops - 1) * batch_size * config.hidden_size * itemsize,
    }


def cache_report(block: Block, variant: Variant, cache: Cache) -> CacheReport:
    """Return the bytes of a cache after a run: measured by part, by the formula, and of the storages behind it."""
    itemsize, static = block.models["plt"].dtype.itemsize, cache.is_compileable
    tokens = block.tokens + block.steps
    measured = cache_bytes(cache)
    formula = expected_cache_bytes(block.config, variant.loops, block.batch_size, tokens, itemsize, static)
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    tensors += [t for layer in cache.layers for t in getattr(layer, "conv_states", {}).values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    total, expected = sum(measured.values()), sum(formula.values())
    return CacheReport(total, measured, formula, total / expected, sum(storages.values()))


def _reads(buffer: torch.Tensor) -> dict[str, Callable]:
    """Return functions that read a float32 buffer of ones once. Viewed as bfloat16 it holds zeros and ones."""
    width = min(4096, buffer.numel() // 2)
    matrix, half = buffer.view(-1, width), buffer.view(torch.bfloat16).view(-1, width)
    row, half_row = buffer[None, :width].clone(), half[:1].clone()
    return {
        "sum, float32": buffer.sum,
        "largest element, float32": buffer.amax,
        "dot product with itself, float32": lambda: buffer @ buffer,
        "matrix times vector, float32": lambda: F.linear(row, matrix),
        "matrix times vector, bfloat16": lambda: F.linear(half_row, half),
    }


def read_bandwidth(size: int, device: torch.device, ways: list[str] | None = None) -> dict[str, float]:
    """Measure the bytes per second at which the machine reads memory outside its caches, for each way of reading.

    The buffer is written first (untouched pages are all the same page) and freed afterwards, so that it does not count in the next
    measurement of memory.

    Args:
        size: bytes of the buffer, a power of two of at least 2**15; it should be several times the largest processor cache.
        device: device of the memory.
        ways: names of the ways to read, as in `_reads`; default: all.
    """
    buffer = torch.ones(size // 4, device=device)
    reads = {name: read for name, read in _reads(buffer).items() if ways is None or name in ways}
    seconds = {
        name: Timer("read()", globals={"read": read}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=0.1)
        .median
        for name, read in reads.items()
    }
    return {name: size / value for name, value in seconds.items()}
