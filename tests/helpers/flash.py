"""FlashAttention as it is documented, in float64: the attention implementation "contract"."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask


def flash_contract(module, query, key, value, attention_mask, *, scaling, sliding_window=None, is_causal=None, **kwargs):
    """What FlashAttention computes from what it is told: causal, aligned at the end, a window that counts the token
    itself, and a 2D padding mask over the keys. In float64, so that it can be compared."""
    groups, is_causal = module.num_key_value_groups, module.is_causal if is_causal is None else is_causal
    assert isinstance(module.layer_idx, int)  # which kernels may ask for
    assert module.config._attn_implementation == "contract"
    assert query.shape[1] == key.shape[1] * groups
    T, S = query.shape[2], key.shape[2]
    assert kwargs["position_ids"].shape[-1] == T  # FlashAttention looks for packed documents in it
    position = torch.arange(S)
    distance = (position[None, :, None][:, -T:] if T <= S else None) - position[None, None, :]
    visible = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if sliding_window is not None:
        visible = visible & (distance < sliding_window)
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], S)
        visible = visible & attention_mask[:, None, :].bool()
    visible = visible[:, None] | torch.eye(T, S, dtype=torch.bool).roll(S - T, 1)
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("contract", flash_contract)
AttentionMaskInterface.register("contract", flash_attention_mask)
