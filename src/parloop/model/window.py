"""The window of loops 2..R as bands: attention that costs T * (w + 1), not T * T.

The tokens are cut into blocks, and each block attends to its own keys and the w before them, with the blocks as a batch dimension.
Token t sees w + 1 keys, t - w .. t. (Example, w = 2: token 5 sees the tokens 3, 4 and 5.)

            keys   | w before | block   |
    queries block  |   x x x  | x       |      w = 3, block = 4
                   |     x x  | x x     |
                   |       x  | x x x   |
                   |          | x x x x |

FlashAttention and flex_attention know windows themselves and get the library's own mask instead (see masks.py).

Axes: B sequences, T tokens of this call, S keys (cached and new), n blocks, H query heads, G key/value heads, K head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import repeat_kv

from .backends import BANDED, AttentionModule, attend


def attend_window(attention: AttentionModule, q_BHTK, k_BGSK, v_BGSK, held: int, mask: Any, **kwargs):
    """Attend with T tokens to their own loop's keys.

    Args:
        held: number of keys that belong to earlier tokens, at most w. They come first, then the T new ones, then perhaps
            the empty slots of a static cache.

    Returns:
        output [B, T, H, K]; weights as the backend gives them (of bands, if there are several tokens), or None.
    """
    T, w = q_BHTK.shape[2], attention.config.window_tokens
    if w == 0:  # the token's only key is its own, with a weight of 1
        own_BTHK = repeat_kv(v_BGSK, attention.num_key_value_groups).transpose(1, 2)
        weight_BTH1 = F.dropout(
            own_BTHK.new_ones(*own_BTHK.shape[:3], 1), attention.config.attention_dropout, attention.training
        )
        return weight_BTH1 * own_BTHK, None
    if T == 1 or attention.config._attn_implementation not in BANDED:
        return attend(attention, q_BHTK, k_BGSK, v_BGSK, mask, windowed=True, **kwargs)
    block = band_block(w)
    k, v = (fold_keys(x[:, :, : held + T], T, w, block) for x in (k_BGSK, v_BGSK))
    out, weights = attend(attention, fold_queries(q_BHTK, block), k, v, mask, **kwargs)
    return out.unflatten(0, (q_BHTK.shape[0], -1)).flatten(1, 2)[:, :T], weights


def dense_weights(weights: torch.Tensor | None, like_BHTS: torch.Tensor, w: int) -> torch.Tensor:
    """Spread the weights of `attend_window` over all S positions: [B, H, T, S]. For inspection only."""
    B, _, T, S = like_BHTS.shape
    if weights is None:  # w = 0: the token itself
        own = torch.eye(T, dtype=like_BHTS.dtype, device=like_BHTS.device)
        return F.pad(own, (S - T, 0)).expand_as(like_BHTS)
    if T == 1:
        return F.pad(weights, (S - weights.shape[-1], 0))
    return unfold_bands(weights, B, T, S, w)


def band_block(w: int) -> int:
    """Return the number of tokens per block."""
    return max(w, 32)


def fold_queries(q_BHTK: torch.Tensor, block: int) -> torch.Tensor:
    """Cut queries into blocks: [B, H, T, K] -> [B * n, H, block, K]."""
    pad = -q_BHTK.shape[2] % block
    return F.pad(q_BHTK, (0, 0, 0, pad)).unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)


def fold_keys(k_BGSK: torch.Tensor, T: int, w: int, block: int) -> torch.Tensor:
    """Cut keys into overlapping blocks: [B, G, S, K], whose last T entries are this call's, -> [B * n, G, w + block, K].
    Missing keys are zeros."""
    before, after = w - (k_BGSK.shape[2] - T), -T % block
    bands = F.pad(k_BGSK, (0, 0, before, after)).unfold(2, w + block, block)  # [B, G, n, K, w + block]
    return bands.permute(0, 2, 1, 4, 3).flatten(0, 1)


def band_mask(B: int, T: int, w: int, past: int, real_BS, document_BT, device) -> torch.Tensor:
    """Make the mask of bands, bool [B * n, 1, block, w + block]: which of its w + block keys each query of a block sees.

    Args:
        past: tokens before this call whose keys are still held, at most w.
        real_BS: bool [B, past + T], False for padding; or None.
        document_BT: int [B, T], which document a token belongs to; or None.
    """
    block = band_block(w)
    n = -(-T // block)
    i = torch.arange(block, device=device)[:, None]
    j = torch.arange(w + block, device=device)[None, :]
    token = torch.arange(n, device=device)[:, None, None] * block + j - w  # index in this call of key j of a block
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
    """Assemble the attention weights of bands into one dense map: [B * n, H, block, w + block] -> [B, H, T, S]. For
    inspection only."""
    bands = weights.unflatten(0, (B, -1))  # [B, n, H, block, w + block]
    n, H, block = bands.shape[1:4]
    dense = weights.new_zeros(B, H, n * block, max(w, S - T) + n * block)
    first = dense.shape[-1] - n * block - w  # the column of token -w
    for m in range(n):
        rows, columns = m * block, first + m * block
        dense[:, :, rows : rows + block, columns : columns + w + block] = bands[:, m]
    token_0 = dense.shape[-1] - n * block
    return dense[:, :, :T, token_0 - (S - T) : token_0 + T]
