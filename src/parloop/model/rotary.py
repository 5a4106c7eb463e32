"""Rotary position embedding (RoPE): Llama's, with angles that stay exact in half precision.

Axes: B sequences, T tokens of this call, K head size.
"""

import torch
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class PLTRotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE with every scaling rule of transformers; angles are computed in float32 or better."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x, position_ids):
        dtype = torch.promote_types(x.dtype, torch.float32)
        freqs = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)  # [B, T, K/2]
        angles = torch.cat((freqs, freqs), dim=-1)  # [B, T, K]
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)

    def _apply(self, fn, recurse=True):
        # Note: model.to(torch.bfloat16) casts buffers too, and frequencies of 8 bits turn far positions into noise
        # (logits drift with the length of the text). Device moves pass through, the frequencies stay as they are.
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(device=getattr(self, name).device))
        return self
