"""Calls of transformers' attention backends (eager, sdpa, flex_attention, FlashAttention), for tokens and for rows of loops.

Axes: B sequences, T tokens of this call, S keys (cached and new), H query heads, G key/value heads, K head size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from .configuration import PLTConfig

BANDED = ("eager", "sdpa")  # backends without windows of their own: see window.py


class AttentionModule(Protocol):
    """Attributes of a layer's attention that a backend and its caller read."""

    config: PLTConfig
    layer_idx: int
    num_key_value_groups: int
    scaling: float
    is_causal: bool
    training: bool


def eager_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
    """Compute plain attention, as transformers' Llama does, but keep float64 and return the weights."""
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores_BHTS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHTS = scores_BHTS + attention_mask
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights_BHTS = F.softmax(scores_BHTS, dim=-1, dtype=dtype).to(query.dtype)
    weights_BHTS = F.dropout(weights_BHTS, p=dropout, training=module.training)
    return (weights_BHTS @ value).transpose(1, 2), weights_BHTS  # [B, T, H, K]


def attend(
    attention: AttentionModule, q_BHTK, k_BGSK, v_BGSK, mask: Any, windowed: bool = False, seen_as: Any = None, **kwargs
):
    """Attend through transformers' interface.

    Args:
        attention: a PLTAttention.
        mask: in the backend's format, see masks.py; None: causal, or every key for a single query.
        windowed: the keys are a later loop's own, of which a query sees w + 1.
        seen_as: the module that is passed to the backend; default: `attention`.

    Returns:
        output [B, T, H, K]; weights [B, H, T, S] or None.
    """
    config = attention.config
    backend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
    if windowed:  # FlashAttention reads this; the library counts the token itself
        kwargs["sliding_window"] = config.window_tokens + 1
    dropout = config.attention_dropout if attention.training else 0.0
    module = attention if seen_as is None else seen_as
    return backend(module, q_BHTK, k_BGSK, v_BGSK, mask, dropout=dropout, scaling=attention.scaling, **kwargs)


def attend_rows(attention: AttentionModule, q_BGnK, k_BGSK, v_BGSK, mask: Any, **kwargs) -> torch.Tensor:
    """Attend with n queries that share a key head and see the same keys, [B, G, n, K]: in a decode step, loops and heads.

    To eager and sdpa they are passed as n tokens of a text without causality, so that a key is read once for all of them; as heads
    of a group, each would read it again. To other backends, which may expect masks to be about tokens, they are passed as heads.
    """
    B, G, n, K = q_BGnK.shape
    if attention.config._attn_implementation in BANDED:
        rows = _Rows(attention, num_key_value_groups=1, is_causal=False)
        return attend(attention, q_BGnK, k_BGSK, v_BGSK, mask, seen_as=rows, **kwargs)[0].transpose(1, 2)
    rows = _Rows(attention, num_key_value_groups=n, is_causal=True)
    out_B1hK, _ = attend(attention, q_BGnK.reshape(B, G * n, 1, K), k_BGSK, v_BGSK, mask, seen_as=rows, **kwargs)
    return out_B1hK.reshape(B, G, n, K)


class _Rows:
    """The module that a backend reads in `attend_rows`: the same layer, with another group count and causality."""

    def __init__(self, attention: AttentionModule, num_key_value_groups: int, is_causal: bool):
        self.num_key_value_groups = num_key_value_groups
        self.is_causal = is_causal
        self.training = attention.training
        self.layer_idx = attention.layer_idx
        self.config = attention.config
