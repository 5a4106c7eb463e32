"""Who sees whom: the masks of one call, and the window as bands.

Window attention costs T * (w + 1), not T * T: the tokens are cut into blocks, and each block attends to its own keys and the
w before them, with the blocks as a batch dimension. Token t sees w + 1 keys, t - w .. t. (Example, w = 2: token 5 sees the
tokens 3, 4 and 5.)

            keys   | w before | block   |
    queries block  |   x x x  | x       |      w = 3, block = 4
                   |     x x  | x x     |
                   |       x  | x x x   |
                   |          | x x x x |

FlashAttention and flex_attention know windows themselves and get the library's own mask instead.

Axes: B sequences, T tokens of this call, S keys (cached and new), H query heads, G key/value heads, K head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .cache import window_index
from .configuration import PLTConfig

Masks = dict[str, Any]  # "full", "window", "carry", "padding": see plt_masks
BANDED = ("eager", "sdpa")  # backends without windows of their own


class WindowView:
    """A configuration as the library's window masks read it. (A real `sliding_window` field would make every stock cache
    window loop 1 too.) The library counts the token itself."""

    def __init__(self, config: PLTConfig):
        self._attn_implementation = config._attn_implementation
        self.sliding_window = config.window_tokens + 1


class TailView:
    """A cache as the masks of a tail read it: loop 1 has stored all tokens of the call, but the tail's queries start at token
    `start`, as if the tail were a call of its own on a cache that holds the rest. `window` is a window layer that does."""

    def __init__(self, cache: Cache, window: int, start: int, keys: int):
        self.cache, self.window, self.start, self.keys = cache, window, start, keys
        self.is_compileable = cache.is_compileable

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.keys, 0) if layer_idx == 0 else self.cache.get_mask_sizes(query_length, self.window)


def check_inputs(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    backend: str,
) -> tuple[torch.Tensor | None, bool]:
    """The attention mask (None if it masks nothing), and whether position_ids pack several documents into a row.

    Raises:
        ValueError: a mask of the wrong shape; packed documents with a cache, with padding, or in several rows with FlashAttention.
    """
    T = inputs_embeds.shape[1]
    is_static = past_key_values is not None and past_key_values.is_compileable
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but PLT derives several masks from it (full, "
                f"window, carry): pass [batch, tokens so far], 1 for real tokens and 0 for padding."
            )
        if not is_static and attention_mask.shape[1] != past + T:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past + T} so far ({past} "
                f"cached, {T} new): it must cover all of them."
            )
    if torch.compiler.is_compiling():  # what follows reads values
        return attention_mask, position_ids is not None and attention_mask is None and past_key_values is None
    if attention_mask is not None and not is_static and bool(attention_mask.all()):
        attention_mask = None
    if position_ids is None or T == 1:
        return attention_mask, False
    if past_key_values is None:
        restarts = position_ids.diff(dim=-1) != 1
    else:
        restarts = position_ids[:, 1:] == 0
    if attention_mask is not None:  # positions may do as they like in padding
        real = attention_mask[:, -T:].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if not bool(restarts.any()):
        return attention_mask, False
    if past_key_values is not None:
        raise ValueError("position_ids restart in a call that uses a cache: pass packed documents with use_cache=False.")
    if attention_mask is not None:
        raise ValueError(
            "Packed documents (position_ids restart) together with padding in attention_mask: leave attention_mask out. "
            "Documents are told apart by position_ids, and padding after them is never seen."
        )
    if backend.startswith("flash") and position_ids.shape[0] > 1:
        raise ValueError(
            f"{backend} tells packed documents apart in batches of one row only: use attn_implementation='sdpa' or "
            f"'flex_attention', or one row per batch."
        )
    return None, True


def _check_padding(attention_mask: torch.Tensor | None, num_loops: int) -> None:
    """Raises ValueError for padding inside a text: windows and carries hold neighbours, and would hold the padding."""
    if attention_mask is None or num_loops == 1 or torch.compiler.is_compiling():
        return
    real = attention_mask.bool()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any()):
        raise ValueError(
            "attention_mask has padding between tokens of one text, as a right-padded prompt has when it is continued: leave it "
            "out, or pad the whole conversation on the left again and start from an empty cache."
        )


def plt_masks(
    config: PLTConfig,
    num_loops: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | TailView | None,
    position_ids: torch.Tensor | None = None,
) -> Masks:
    """Everything that decides who sees whom in one call, shared by all layers and loops.

    Args:
        num_loops: R.
        inputs_embeds: [B, T, ...]; only its shape, dtype and device are used.
        attention_mask: [B, tokens so far, this call's included], nonzero for real tokens; or None.
        past_key_values: the cache before this call; or None.
        position_ids: [B, T] or None. Without a cache, another document starts where they do not go up by one.

    Returns:
        "full": causal mask over loop 1's keys; "window": mask over a later loop's own keys (banded if this call has several
        tokens and the backend knows no windows); "carry": bool [B, T], whether a token may read its predecessor's state. The
        first token of a text has no predecessor: neither padding nor another document may leak into it. "padding": the
        attention mask, from which the masks of a tail are made.
    """
    B, T = inputs_embeds.shape[:2]
    w, device, backend = config.window_tokens, inputs_embeds.device, config._attn_implementation
    is_static = past_key_values is not None and past_key_values.is_compileable
    masks: Masks = {"full": None, "window": None, "carry": None, "padding": None}
    _check_padding(attention_mask, num_loops)
    if T == 1 and attention_mask is None and not is_static:
        return masks  # one token sees everything that is held

    if attention_mask is not None:
        masks["padding"] = attention_mask = attention_mask.to(device=device, dtype=torch.bool)
    if position_ids is not None:
        position_ids = position_ids.expand(B, -1) if attention_mask is None and past_key_values is None else None
    shared: dict[str, Any] = {
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
    }
    masks["full"] = _laid_out(create_causal_mask(config, layer_idx=0, **shared), inputs_embeds, backend)
    if num_loops == 1:
        return masks

    document = None
    if position_ids is not None:
        document = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # [B, T]
        masks["carry"] = document.diff(prepend=document[:, :1]) == 0
    elif attention_mask is not None:
        before = F.pad(attention_mask, (1, 0), value=False)
        masks["carry"] = attention_mask[:, -T:] & before[:, -T - 1 : -1]

    first_window = window_index(config, 1, 0)
    if w == 0:
        pass  # a token's only key is its own
    elif T > 1 and backend in BANDED:
        held = 0 if past_key_values is None else min(past_key_values.get_seq_length(first_window), w)
        real = None if attention_mask is None else attention_mask[:, -(held + T) :]
        masks["window"] = _laid_out(band_mask(B, T, w, held, real, document, device), inputs_embeds, backend)
    else:
        view: Any = WindowView(config)
        masks["window"] = create_sliding_window_causal_mask(view, layer_idx=first_window, **shared)
    return masks


def _laid_out(mask: Any, inputs_embeds: torch.Tensor, backend: str) -> Any:
    """A mask of eager and sdpa as what is added to scores, once for all layers and loops. (sdpa would turn one of bools into
    this at every visit of a layer, and in training keep each for the backward pass: T * T numbers per visit.)"""
    if backend not in BANDED or mask is None or mask.dtype != torch.bool or mask.shape[2] == 1:
        return mask
    device = inputs_embeds.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs_embeds.dtype  # of the queries
    out_of_sight = torch.finfo(dtype).min if backend == "eager" else -torch.inf
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, out_of_sight)


def band_block(w: int) -> int:
    return max(w, 32)


def fold_queries(q_BHTK: torch.Tensor, block: int) -> torch.Tensor:
    """[B, H, T, K] -> [B * n, H, block, K], n blocks."""
    pad = -q_BHTK.shape[2] % block
    return F.pad(q_BHTK, (0, 0, 0, pad)).unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)


def fold_keys(k_BGSK: torch.Tensor, T: int, w: int, block: int) -> torch.Tensor:
    """[B, G, S, K], whose last T entries are this call's, -> [B * n, G, w + block, K]. Missing keys are zeros."""
    before, after = w - (k_BGSK.shape[2] - T), -T % block
    bands = F.pad(k_BGSK, (0, 0, before, after)).unfold(2, w + block, block)  # [B, G, n, K, w + block]
    return bands.permute(0, 2, 1, 4, 3).flatten(0, 1)


def band_mask(B: int, T: int, w: int, past: int, real_BS, document_BT, device) -> torch.Tensor:
    """Which of its w + block keys each query of a block sees: bool [B * n, 1, block, w + block].

    Args:
        past: tokens before this call whose keys are still held, at most w.
        real_BS: bool [B, past + T], False for padding; or None.
        document_BT: int [B, T], which document a token belongs to; or None.
    """
    block = band_block(w)
    n = -(-T // block)
    i = torch.arange(block, device=device)[:, None]
    j = torch.arange(w + block, device=device)[None, :]
    token = torch.arange(n, device=device)[:, None, None] * block + j - w  # which token of this call key j of a block is
    mask = ((i <= j) & (j <= i + w) & (token >= -past)).expand(B, n, block, w + block)

    def fold(values, fill, before):  # [B, S] -> [B, n, 1, w + block]
        return F.pad(values, (before, -T % block), value=fill).unfold(1, w + block, block)[:, :, None, :]

    if real_BS is not None:
        mask = mask & (fold(real_BS, False, w - past) | (j == i + w))  # padding sees itself: a row without keys is NaN
    if document_BT is not None:
        queries = F.pad(document_BT, (0, -T % block), value=-1).view(B, n, block, 1)
        mask = mask & (queries == fold(document_BT, -1, w))
    return mask.flatten(0, 1)[:, None]


def unfold_bands(weights: torch.Tensor, B: int, T: int, S: int, w: int) -> torch.Tensor:
    """Attention weights of bands as one dense map: [B * n, H, block, w + block] -> [B, H, T, S]. For inspection only."""
    bands = weights.unflatten(0, (B, -1))  # [B, n, H, block, w + block]
    n, H, block = bands.shape[1:4]
    dense = weights.new_zeros(B, H, n * block, max(w, S - T) + n * block)
    first = dense.shape[-1] - n * block - w  # the column of token -w
    for m in range(n):
        rows, columns = m * block, first + m * block
        dense[:, :, rows : rows + block, columns : columns + w + block] = bands[:, m]
    token_0 = dense.shape[-1] - n * block
    return dense[:, :, :T, token_0 - (S - T) : token_0 + T]
