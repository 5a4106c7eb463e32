"""The cache of a PLT: stock transformers cache layers in one list, so that crop, reorder, reset and static come from there.

    index                       layer kind              holds
    0 .. L-1                    full                    loop 1's keys and values of every token
    L .. L*R-1                  window, one per layer   loop r's own keys and values of the last w tokens
                                and loop r >= 2
    L*R .. L*R+R-2              carry, one per boundary  loop r's state of the last token, which loop r+1 reads as shift(h_r)

Only loop 1's keys and values grow with the text (PLT paper, section 3: the shared cache). Loops are counted from 0 here.
"""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .configuration import PLTConfig


def full_index(config: PLTConfig, layer: int) -> int:
    return layer


def window_index(config: PLTConfig, loop: int, layer: int) -> int:
    return config.num_hidden_layers * loop + layer


def carry_index(config: PLTConfig, num_loops: int, loop: int) -> int:
    """Index of the carry from `loop` to `loop + 1`."""
    return config.num_hidden_layers * num_loops + loop


def make_cache(config: PLTConfig, num_loops: int | None = None, max_cache_len: int | None = None) -> Cache:
    """An empty cache for `num_loops` loops (default: the configuration's).

    Args:
        config: the model's configuration.
        num_loops: R. The cache then serves calls with this loop count only.
        max_cache_len: in tokens. If given, the cache is static (fixed addresses, for torch.compile); else it grows.
    """
    cache = StaticCache(config, max_cache_len) if max_cache_len is not None else DynamicCache(config=config)
    return extend_cache(cache, config, num_loops or config.plt_num_loops)


def extend_cache(cache: Cache, config: PLTConfig, num_loops: int) -> Cache:
    """Make an empty stock cache hold what `num_loops` loops need, in place; check one that is already extended.

    Raises:
        ValueError: the cache holds tokens but was not made for `num_loops` loops.
    """
    L, R = config.num_hidden_layers, num_loops
    if len(cache.layers) == L * R + R - 1 and (R == 1 or isinstance(cache.layers[-1], LinearAttentionLayer)):
        if not cache.is_compileable and cache.get_seq_length() == 0:  # after a reset, another batch size may follow
            for index, carry in enumerate(cache.layers):
                if isinstance(carry, LinearAttentionLayer):
                    cache.layers[index] = fresh = LinearAttentionLayer()
                    fresh.record_past = carry.record_past
        return cache
    if cache.get_seq_length() > 0:
        loops = cached_loops(cache, config)
        made_for = f"was filled with num_loops={loops}" if loops else f"has {len(cache.layers)} layers"
        raise ValueError(
            f"The cache {made_for} and cannot be continued with num_loops={R}, whose windows and carries it lacks: pass the "
            f"num_loops it was filled with, or start from an empty cache."
        )
    full = cache.layers[:L]
    if not full:  # DynamicCache() without a configuration adds layers when they are first used
        full = DynamicCache(config=config).layers
    cache.layers = full
    for _ in range(L * (R - 1)):
        cache.layers.append(_window_layer(full[0], config))
    for _ in range(R - 1):
        cache.layers.append(LinearAttentionLayer())  # a conv state of width 1 is the memory of the shift
    return cache


def _window_layer(like: object, config: PLTConfig):
    w = config.window_tokens
    if w == 0:  # the token itself: nothing to remember. (A stock window layer of size 1 would keep everything.)
        return DummyLayer()
    if isinstance(like, StaticLayer):
        return StaticSlidingWindowLayer(max_cache_len=like.max_cache_len, sliding_window=w + 1)
    return DynamicSlidingWindowLayer(sliding_window=w + 1)  # the library counts the token itself, and keeps w


def tail_tokens(config: PLTConfig, num_loops: int, keep: int, loop: int, layer: int) -> int:
    """How many of the last tokens a layer must be run on in one of the loops 2..R, if only loop R's last `keep` states are
    needed, and a cache to go on from. Loop 1 runs on every token.

    A layer's output reads its input at its own token and the w before it, so every layer is needed on w tokens more than the
    next one. Loop r+1's input reads loop r one token to the left, and whatever comes next will read loop r's last state.
    """
    L, w = config.num_hidden_layers, config.window_tokens
    return keep + (num_loops - 1 - loop) * (L * w + 1) + (L - layer) * w


def catch_up(cache: Cache, index: int, tokens: int, w: int, k1_BGSK: torch.Tensor) -> None:
    """Make a window layer one that was given `tokens` tokens, if it was not. What it holds is then not adjacent to what comes
    next: zeros take its place, and are read only where nothing that is needed depends on it (see `tail_tokens`)."""
    layer: Any = cache.layers[index]
    if w == 0 or layer.get_seq_length() == tokens:
        return
    layer.reset()
    B, G, _, K = k1_BGSK.shape
    zeros = k1_BGSK.new_zeros(B, G, min(tokens, w), K)
    layer.update(zeros, zeros)
    length = "cumulative_length_int" if isinstance(layer, StaticLayer) else "cumulative_length"
    setattr(layer, length, tokens)


def cached_loops(cache: Cache, config: PLTConfig) -> int | None:
    """The loop count that a cache was made for, or None if it is not one of ours."""
    loops, rest = divmod(len(cache.layers) + 1, config.num_hidden_layers + 1)
    return loops if rest == 0 and loops >= 1 else None


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes held by a cache: {"full", "window", "carry"}."""
    held = {"full": 0, "window": 0, "carry": 0}
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            held["carry"] += sum(state.nbytes for state in layer.conv_states.values() if state is not None)
        elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
            kind = "window" if getattr(layer, "is_sliding", False) else "full"
            held[kind] += layer.keys.nbytes + layer.values.nbytes
    return held
