"""The offset between loops: b_r, the input of loop r, made from E, h_{r-1} and what the cache carries.

    b_r = a * E + c * shift(h_{r-1})

The shift is the paper's *cross-loop position offset* (LoopCoder-v2, arXiv 2606.18023; PLT, arXiv 2510.24824): token t reads the
state of token t - s, s = 1. What a loop reads of earlier tokens is known before a decode step begins, so that all loops of a token
can be rows of one pass over the weights. With s = 0 (no offset: the token's own state, as in an ordinary looped transformer) a
loop has to wait for the one before it, and a step takes a pass per loop.

All that distinguishes the loops is in this file. Another way to do so is another `Offset`, with a line in reference.py.

Axes: B sequences, T tokens of this call, N of them in a tail (see tail.py), D hidden size, R loops, s offset. Loops from 0.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import carry_index
from .configuration import PLTConfig
from .masks import Masks


class Offset(nn.Module):
    """b_r = a * E + c * shift(h_{r-1}), and the memory of the shift: the last s states of every loop but the last."""

    def __init__(self, config: PLTConfig):
        super().__init__()
        self.config = config

    @property
    def tokens(self) -> int:
        """s, the number of tokens to the left at which a loop reads the loop before."""
        return self.config.plt_offset

    def combine(self, e_BTD: torch.Tensor, seen_BTD: torch.Tensor) -> torch.Tensor:
        """Return a * E + c * seen, where `seen_BTD` is the part of the loop before that this loop reads."""
        a, c = self.config.plt_emb_scale, self.config.plt_hidden_scale
        return (e_BTD if a is None else a * e_BTD) + (seen_BTD if c is None else c * seen_BTD)

    def forward(
        self, e_BTD: torch.Tensor, h_BND: torch.Tensor, loop: int, num_loops: int, masks: Masks, cache: Cache | None
    ) -> torch.Tensor:
        """Make the input of `loop` (1 .. R-1) on the last N tokens of the call, [B, N, D].

        Args:
            e_BTD: the embeddings of the call's tokens.
            h_BND: the state of the loop before, on the last N of them.
        """
        N = h_BND.shape[1]
        seen_BND = h_BND = h_BND.to(e_BTD.device)  # of a model split over devices, from the last to the first
        if self.tokens > 0:
            seen_BND = torch.cat((self._carried(cache, loop - 1, num_loops, h_BND), h_BND), dim=1)[:, :N]
            self._carry(cache, h_BND, loop - 1, num_loops)  # overwrites the carry in place, so only now
            seen_BND = _where(masks["carry"], seen_BND)
        return self.combine(e_BTD[:, -N:], seen_BND)

    def of_one_token(self, e_B1D: torch.Tensor, num_loops: int, masks: Masks, cache: Cache | None) -> torch.Tensor:
        """Make the inputs of all loops of one token, [B, R, D]: E, b_2 .. b_R. They are known before the step, since s >
        0."""
        if num_loops == 1:
            return e_B1D
        carried = [self._carried(cache, loop, num_loops, e_B1D)[:, :1] for loop in range(num_loops - 1)]
        seen_BrD = carried[0] if num_loops == 2 else torch.cat(carried, dim=1)
        return torch.cat((e_B1D, self.combine(e_B1D, _where(masks["carry"], seen_BrD))), dim=1)

    def carry_one_token(self, h_BRD: torch.Tensor, cache: Cache | None) -> None:
        """Store those of this token's states h_1 .. h_{R-1} that later tokens read."""
        R = h_BRD.shape[1]
        for loop in range(R - 1):
            self._carry(cache, h_BRD[:, loop : loop + 1], loop, R)

    def _carried(self, cache: Cache | None, loop: int, num_loops: int, like_BND: torch.Tensor) -> torch.Tensor:
        """Return the state of `loop` of the s tokens before this call, [B, s, D]; zeros where there are none."""
        B, _, D = like_BND.shape
        state_BDn = None if cache is None else cache.get_conv_state(carry_index(self.config, num_loops, loop))
        if state_BDn is None or state_BDn.shape[-1] == 0:
            return like_BND.new_zeros(B, self.tokens, D)
        state_BnD = state_BDn[..., -self.tokens :].transpose(1, 2).to(like_BND)
        missing = self.tokens - state_BnD.shape[1]  # of a short text, in a cache that records its past
        return state_BnD if missing == 0 else nn.functional.pad(state_BnD, (0, 0, missing, 0))

    def _carry(self, cache: Cache | None, h_BND: torch.Tensor, loop: int, num_loops: int) -> None:
        if cache is None:
            return
        index = carry_index(self.config, num_loops, loop)
        if not cache.is_recording_past(index):  # assisted decoding records, so that rejected tokens can be cropped
            h_BND = h_BND[:, -self.tokens :]
        held_BDn = cache.get_conv_state(index)
        if held_BDn is not None:
            h_BND = h_BND.to(held_BDn.device)
        cache.update_conv_state(h_BND.transpose(1, 2), index, conv_kernel_size=self.tokens)


def _where(keep_BT: torch.Tensor | None, h_BND: torch.Tensor) -> torch.Tensor:
    """Return h where a token has a predecessor, and 0 elsewhere: for a tail's N tokens, or the rows of one token (T = 1)."""
    if keep_BT is None:
        return h_BND
    N = min(h_BND.shape[1], keep_BT.shape[1])
    return torch.where(keep_BT[:, -N:, None], h_BND, 0.0)
