"""The masks of one call, shared by all layers and loops.

Axes: B sequences, T tokens of this call, S keys (cached and new).
"""

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .backends import BANDED
from .cache import is_static, prefix_tokens, window_index
from .cache_argument import CACHE
from .configuration import PLTConfig
from .window import band_mask


class Masks(TypedDict, total=False):
    """The masks of one call. A dictionary, not a dataclass: device hooks of accelerate move the tensors in it."""

    full: Any
    """Causal mask over loop 1's keys, in the backend's format. None: plain causality."""
    window: Any
    """Mask over a later loop's own keys; of bands, if the call has several tokens and the backend knows no windows."""
    carry: torch.Tensor | None
    """bool [B, T]: may a token read the state of the token `plt_offset` before it? The first tokens of a text may not: neither
    padding nor another document may leak into them. None: all may (the memory of an empty cache is zeros)."""
    padding: torch.Tensor | None
    """bool [B, tokens so far], False for padding: what the masks of a tail are made from. Absent in compiled steps."""


class WindowView:
    """A configuration as the library's window masks read it. (A real `sliding_window` field would make every stock cache
    window loop 1 too.) The library counts the token itself."""

    def __init__(self, config: PLTConfig):
        self._attn_implementation = config._attn_implementation
        self.sliding_window = config.window_tokens + 1


def plt_masks(
    config: PLTConfig,
    num_loops: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None = None,
) -> Masks:
    """Make the masks of one call: all that decides which token sees which.

    Args:
        num_loops: R.
        inputs_embeds: [B, T, ...]; only its shape, dtype and device are used.
        attention_mask: [B, tokens so far, this call's included], nonzero for real tokens; or None.
        cache: the cache before this call (or a tail.TailView of it); or None.
        position_ids: [B, T] or None. Without a cache, another document starts where they do not go up by one.
    """
    B, T = inputs_embeds.shape[:2]
    w, s, device, backend = config.window_tokens, config.plt_offset, inputs_embeds.device, config._attn_implementation
    static = is_static(cache)
    masks: Masks = {"full": None, "window": None, "carry": None, "padding": None}
    if T == 1 and attention_mask is None and not static:
        return masks  # one token sees everything that is held

    real_BS = None if attention_mask is None else attention_mask.to(device=device, dtype=torch.bool)
    masks["padding"] = real_BS
    document_BT = None
    if position_ids is not None and real_BS is None and cache is None:
        position_ids = position_ids.expand(B, -1)
        document_BT = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    else:
        position_ids = None
    if num_loops > 1 and s > 0:
        if document_BT is not None:
            masks["carry"] = F.pad(document_BT, (s, 0), value=-1)[:, :T] == document_BT
        elif real_BS is not None:
            masks["carry"] = real_BS[:, -T:] & F.pad(real_BS, (s, 0), value=False)[:, -T - s : -s]

    first_window = window_index(config, 1, 0)
    held = 0 if cache is None or num_loops == 1 or w == 0 else min(cache.get_seq_length(first_window), w)
    if T == 1 and real_BS is not None and not static and backend in BANDED:  # the library would read its values
        masks["full"] = _for_one_query(real_BS, inputs_embeds, backend)
        if num_loops > 1 and w > 0:
            masks["window"] = _for_one_query(real_BS[:, -held - 1 :], inputs_embeds, backend)
        return masks

    shared: dict[str, Any] = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": real_BS,
        CACHE: cache,
        "position_ids": position_ids,
        "allow_is_causal_skip": not (static and T == 1),  # the library thinks of static caches that can be compiled only
    }
    masks["full"] = _as_bias(create_causal_mask(config, layer_idx=0, **shared), inputs_embeds, backend)
    if num_loops == 1 or w == 0:  # with w = 0 a token's only key is its own
        return masks
    if T > 1 and backend in BANDED:
        real = None if real_BS is None else real_BS[:, -(held + T) :]
        masks["window"] = _as_bias(band_mask(B, T, w, held, real, document_BT, device), inputs_embeds, backend)
    else:
        view: Any = WindowView(config)
        shared["attention_mask"] = None if real_BS is None else real_BS[:, prefix_tokens(cache) :]
        masks["window"] = create_sliding_window_causal_mask(view, layer_idx=first_window, **shared)
    return masks


def _for_one_query(real_BS: torch.Tensor, inputs_embeds: torch.Tensor, backend: str) -> torch.Tensor:
    """Make the mask of a query that sees every real key, [B, 1, 1, S]: bool for sdpa, additive for eager. A row that is padding
    throughout sees all of it, since a softmax over no keys is NaN. Reads no values."""
    mask = (real_BS | ~real_BS.any(-1, keepdim=True))[:, None, None, :]
    if backend == "sdpa":
        return mask
    out_of_sight = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros(mask.shape, dtype=inputs_embeds.dtype, device=mask.device).masked_fill_(~mask, out_of_sight)


def _as_bias(mask: Any, inputs_embeds: torch.Tensor, backend: str) -> Any:
    """Turn a boolean mask of eager or sdpa into an additive one, once per call. (sdpa would convert it at every visit of a
    layer, and in training keep each copy for the backward pass: T * T numbers per visit.)"""
    if backend not in BANDED or mask is None or mask.dtype != torch.bool or mask.shape[2] == 1:
        return mask
    device = inputs_embeds.device.type
    is_mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_mixed else inputs_embeds.dtype  # of the queries
    out_of_sight = torch.finfo(dtype).min if backend == "eager" else -torch.inf
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, out_of_sight)
