"""The tail of a prompt: loops 2..R run only on the last tokens, those that the wanted logits and the cache depend on.

To generate, only a prompt's last logits are needed, and loops 2..R see the prompt mostly through loop 1's keys and values. So loop
1 runs on every token, and the later loops on the end of the prompt only; the logits are the same, bit for bit in exact arithmetic.
How long that end is follows from the equations, going backwards from the states of loop R that are needed: see `tail_tokens`.

Axes: B sequences, T tokens of this call, N of them in the tail, D hidden size. Loops and layers from 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, StaticLayer

from .cache import is_recording_past, prefix_tokens, window_index
from .configuration import PLTConfig
from .masks import Masks, plt_masks


def tail_tokens(config: PLTConfig, num_loops: int, keep: int, loop: int, layer: int) -> int:
    """Count the last tokens on which a layer must run in one of the loops 2..R, if only loop R's last `keep` states are
    needed, and a cache to go on from. Loop 1 runs on every token.

    A layer's output reads its input at its own token and the w before it, so every layer is needed on w tokens more than the
    next one. Loop r+1's input reads loop r s tokens to the left (s = 1, the offset), and whatever comes next will read loop r's
    last states.
    """
    L, w, s = config.num_hidden_layers, config.window_tokens, config.plt_offset
    return keep + (num_loops - 1 - loop) * (L * w + s) + (L - layer) * w


def states_needed(
    config: PLTConfig,
    masks: Masks,
    cache: Cache | None,
    tokens: int,
    states_to_keep: int | None,
    prompt_tokens: int,
) -> int | None:
    """Count loop R's last states of this call that are needed. Zero or less means that the needed ones come later in the prompt.
    None means all of them: with gradients enabled, without a cache, with a cache that will be cropped (assisted decoding) or begins
    with a learnt prefix, and where code is compiled for each shape (torch.compile, flex_attention).

    Args:
        tokens: T.
        states_to_keep: number of last states that the caller needs; None: all.
        prompt_tokens: if this call is a chunk of a prompt, the number of tokens of the whole prompt; otherwise 0.
    """
    if states_to_keep is None or cache is None or torch.is_grad_enabled() or "padding" not in masks:
        return None
    if torch.compiler.is_compiling() or config._attn_implementation == "flex_attention":
        return None
    if is_recording_past(cache, config) or prefix_tokens(cache):
        return None
    still_to_come = prompt_tokens - int(cache.get_seq_length()) - tokens if prompt_tokens else 0
    return states_to_keep - max(0, still_to_come)


class Tail:
    """All layers of one loop: loop 1 on every token, later loops on a tail that gets shorter from layer to layer.

    Replaces `PLTModel._stack` for one call.
    """

    def __init__(
        self, config: PLTConfig, layers: Any, stack: Callable, keep: int, tokens: int, num_loops: int, cache: Cache
    ):
        self.config, self.layers, self.stack, self.cache = config, layers, stack, cache
        self.keep, self.tokens, self.num_loops = keep, tokens, num_loops
        self.past = int(cache.get_seq_length())
        self.calls: dict[int, dict] = {}  # keyword arguments of a layer, by the length of the tail

    def __call__(self, x_BND: torch.Tensor, k1: list, v1: list, loop: int, call: dict):
        if loop == 0:
            return self.stack(x_BND, k1, v1, loop, call)
        for i, layer in enumerate(self.layers):
            N = min(self.tokens, tail_tokens(self.config, self.num_loops, self.keep, loop, i))
            if N <= 0:  # what is needed comes later in the prompt
                return x_BND[:, :0], k1, v1
            x_BND, start, window = x_BND[:, -N:], self.past + self.tokens - N, window_index(self.config, loop, i)
            catch_up(self.cache, window, start, self.config.window_tokens, k1[i])
            if N not in self.calls:
                self.calls[N] = self._call(x_BND, TailView(self.cache, window, start, k1[i].shape[2]), **call)
            x_BND, k1[i], v1[i] = layer(x_BND, k1[i], v1[i], loop=loop, one_token=False, **self.calls[N])
        return x_BND, k1, v1

    def _call(self, x_BND: torch.Tensor, view: "TailView", masks: Masks, position_embeddings, position_ids, **call) -> dict:
        """Restrict the call's keyword arguments to its last N tokens."""
        N = x_BND.shape[1]
        return call | {
            "masks": plt_masks(self.config, self.num_loops, x_BND, masks["padding"], view),
            "position_embeddings": tuple(angles[:, -N:] for angles in position_embeddings),
            "position_ids": position_ids[:, -N:],
        }


class TailView:
    """Cache facade for the masks of a tail: loop 1 has stored all tokens of the call, but the tail's queries start at token `start`,
    as if the tail were a separate call on a cache that holds the rest. `window`: index of a window layer that does hold it."""

    def __init__(self, cache: Cache, window: int, start: int, keys: int):
        self.cache, self.window, self.start, self.keys = cache, window, start, keys
        self.layers, self.is_compileable = cache.layers, cache.is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.keys, 0) if layer_idx == 0 else self.cache.get_mask_sizes(query_length, self.window)


def catch_up(cache: Cache, index: int, tokens: int, w: int, k1_BGSK: torch.Tensor) -> None:
    """Pad a window layer with zeros so that its length is `tokens`; a no-op if it already is. What the layer held is not adjacent
    to what comes next. The zeros are never read by a state that is kept (see `tail_tokens`)."""
    layer: Any = cache.layers[index]
    if w == 0 or layer.get_seq_length() == tokens:
        return
    layer.reset()
    B, G, _, K = k1_BGSK.shape
    zeros = k1_BGSK.new_zeros(B, G, min(tokens, w), K)
    layer.update(zeros, zeros)
    length = "cumulative_length_int" if isinstance(layer, StaticLayer) else "cumulative_length"
    setattr(layer, length, tokens)
