"""The cache of a PLT: stock transformers cache layers in one list, so that crop, reorder, reset and static come from there.

    index                       layer kind              holds
    0 .. L-1                    full                    loop 1's keys and values of every token
    L .. L*R-1                  window, one per layer   loop r's own keys and values of the last w tokens
                                and loop r >= 2
    L*R .. L*R+R-2              carry, one per boundary  loop r's state of the last s tokens, which loop r+1 reads as shift(h_r);
                                                        s = 1, the offset. With s = 0 there are none

Only loop 1's keys and values grow with the text (PLT paper, section 3: the shared cache). Loops are counted from 0 here.

Axes: B sequences, N new tokens, S keys (cached and new), G key/value heads, K head size.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .configuration import PLTConfig, loop_count


def window_index(config: PLTConfig, loop: int, layer: int) -> int:
    """Return the index of the window of `layer` in `loop` (1 .. R-1)."""
    return config.num_hidden_layers * loop + layer


def carry_index(config: PLTConfig, num_loops: int, loop: int) -> int:
    """Return the index of the carry from `loop` to `loop + 1`."""
    return config.num_hidden_layers * num_loops + loop


def carries(config: PLTConfig, num_loops: int) -> int:
    """Count the carries in a cache."""
    return num_loops - 1 if config.plt_offset > 0 else 0


class PrefixCache(DynamicCache):
    """A cache that begins with learnt keys and values, as PEFT's prefix tuning makes it. Loop 1 holds them, so every loop
    attends to them globally. They have no states: windows and carries begin with the text."""

    def __init__(self, keys_and_values: Iterable[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(keys_and_values)
        self.prefix_tokens = self.get_seq_length()


def prefix_tokens(cache: Any) -> int:
    """Count the tokens at a cache's beginning that only loop 1 holds."""
    return cache.prefix_tokens if isinstance(cache, PrefixCache) else 0


def make_cache(config: PLTConfig, num_loops: int | None = None, max_cache_len: int | None = None) -> Cache:
    """Make an empty cache for `num_loops` loops (default: the configuration's).

    Args:
        config: the model's configuration.
        num_loops: R. The cache then serves calls with this loop count only.
        max_cache_len: in tokens. If given, the cache is static (fixed addresses, for torch.compile); otherwise it grows.

    Returns:
        A stock DynamicCache or StaticCache of L * R + R - 1 layers, see the table at the top of this file.

    Raises:
        ValueError: num_loops is not an integer of at least 1.
    """
    R = config.plt_num_loops if num_loops is None else loop_count(num_loops)
    if max_cache_len is None:
        return extend_cache(DynamicCache(config=config), config, R)
    cache = StaticCache(config, max_cache_len)
    cache.layers = _with_batch_operations(cache.layers)
    return extend_cache(cache, config, R)


def extend_cache(cache: Cache, config: PLTConfig, num_loops: int) -> Cache:
    """Make an empty stock cache hold what `num_loops` loops need, in place; check one that is already extended.

    Raises:
        ValueError: the cache holds tokens but was not made for `num_loops` loops, or forgets tokens of loop 1.
    """
    L, R = config.num_hidden_layers, num_loops
    if any(getattr(layer, "is_sliding", True) for layer in cache.layers[:L]):  # layers of linear attention do not say
        raise ValueError(
            "The cache was made for a model whose layers see windows or states, and would forget tokens that every loop of a PLT "
            "reads: make it with parloop.make_cache(model.config), or pass an empty DynamicCache()."
        )
    n = carries(config, R)
    if len(cache.layers) == L * R + n and (R == 1 or isinstance(cache.layers[-1], (CarryLayer, *WINDOWS))):
        if not is_static(cache) and cache.get_seq_length() == 0:  # after a reset, another batch size may follow
            for index in range(L * R, L * R + n):
                carry: Any = cache.layers[index]
                cache.layers[index] = fresh = CarryLayer()
                fresh.record_past = carry.record_past
        return cache
    if cache.get_seq_length() > prefix_tokens(cache):
        loops = cached_loops(cache, config)
        made_for = f"was filled with num_loops={loops}" if loops else f"has {len(cache.layers)} layers"
        raise ValueError(
            f"The cache {made_for} and cannot be continued with num_loops={R}, whose windows and carries it lacks: pass the "
            f"num_loops it was filled with, or start from an empty cache."
        )
    full = _with_batch_operations(cache.layers[:L])
    if not full:  # DynamicCache() without a configuration adds layers when they are first used
        full = DynamicCache(config=config).layers
    windows = [_window_layer(full[0], config) for _ in range(L * (R - 1))]
    cache.layers = [*full, *windows, *(CarryLayer() for _ in range(n))]
    return cache


def remember(cache: Cache | None, k_BGNK: torch.Tensor, v_BGNK: torch.Tensor, index: int):
    """Append keys and values to a layer of the cache, and return all that it holds, [B, G, S, K] each. Without a cache, or in a
    layer that holds nothing (w = 0), these are the new ones."""
    if cache is None or isinstance(cache.layers[index], DummyLayer):
        return k_BGNK, v_BGNK
    return cache.update(k_BGNK, v_BGNK, index)


def tokens_held(cache: Cache | None, config: PLTConfig, loop: int, layer: int) -> int:
    """Count the earlier tokens that a window holds, at most w."""
    w = config.window_tokens
    return 0 if cache is None or w == 0 else min(cache.get_seq_length(window_index(config, loop, layer)), w)


def is_static(cache: Any) -> bool:
    """Check whether a cache has a fixed length, part of which may be empty. (`is_compileable` is not the same: a static cache that
    records its past is not.)"""
    return cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)


def is_recording_past(cache: Cache, config: PLTConfig) -> bool:
    """Check whether windows and carries keep the states that a later crop may need (assisted decoding)."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers[config.num_hidden_layers :])


def cached_loops(cache: Cache, config: PLTConfig) -> int | None:
    """Return the loop count that a cache was made for, 0 if it has no layers yet, or None if parloop did not make it."""
    extra = 1 if config.plt_offset > 0 else 0
    loops, rest = divmod(len(cache.layers) + extra, config.num_hidden_layers + extra)
    return loops if rest == 0 else None


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Count the bytes that a cache holds: {"full", "window", "carry"}."""
    held = {"full": 0, "window": 0, "carry": 0}
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, LinearAttentionLayer):
            held["carry"] += sum(state.nbytes for state in layer.conv_states.values() if state is not None)
        elif layer.keys is not None:
            kind = "window" if layer.is_sliding else "full"
            held[kind] += layer.keys.nbytes + layer.values.nbytes
    return held


# Stock layers, with the operations on batches that the library gives to growing layers only.


class StaticFullLayer(StaticLayer):
    def batch_repeat_interleave(self, repeats: int) -> None:
        _change_batch(self, lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        _change_batch(self, lambda x: x[indices, ...])


class StaticWindowLayer(StaticSlidingWindowLayer):
    batch_repeat_interleave = StaticFullLayer.batch_repeat_interleave
    batch_select_indices = StaticFullLayer.batch_select_indices


class CarryLayer(LinearAttentionLayer):
    """A conv state of width s: the memory of the shift."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices, ...])

    def _change(self, change: Any) -> None:
        self.conv_states = {i: state if state is None else change(state) for i, state in self.conv_states.items()}


WINDOWS = (DummyLayer, DynamicSlidingWindowLayer, StaticWindowLayer)


def _change_batch(layer: Any, change: Any) -> None:
    if layer.is_initialized:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
        layer.batch_size = layer.keys.shape[0]


def _window_layer(like: object, config: PLTConfig):
    w = config.window_tokens
    if w == 0:  # the token itself: nothing to remember. (A stock window layer of size 1 would keep everything.)
        return DummyLayer()
    if isinstance(like, StaticLayer):
        return StaticWindowLayer(max_cache_len=like.max_cache_len, sliding_window=w + 1)
    return DynamicSlidingWindowLayer(sliding_window=w + 1)  # the library counts the token itself, and keeps w


def _with_batch_operations(layers: list) -> list:
    return [StaticFullLayer(layer.max_cache_len) if type(layer) is StaticLayer else layer for layer in layers]
