"""Attention distributions of every loop, from a running model, a few queries at a time.

The model keeps its own attention backend. A hook on each layer's attention takes the rotated queries and keys and the gate, and recomputes
the distributions for a block of queries, so that no H x T x T map ever exists. From the loop before it keeps only queries, window keys and
gates.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..model.modeling import PLTAttention, PLTModel
from .lenses import entropy, gated_mixture, head_relations, kl, mean_off_diagonal

BLOCK_BYTES = 64 * 2**20  # of one block of log-probabilities; about ten such tensors are alive at once


def who_sees_whom(real_BT: torch.Tensor, document_BT: torch.Tensor) -> torch.Tensor:
    """Return the keys that loop 1 lets every query attend to, bool [B, T, T]: real tokens of the same document, up to the
    query.

    Every token attends to itself, padding too, since a softmax over no keys is NaN.
    """
    T = real_BT.shape[1]
    order = torch.ones(T, T, dtype=torch.bool, device=real_BT.device).tril()
    same = document_BT[:, :, None] == document_BT[:, None, :]
    return (order & same & real_BT[:, None, :]) | torch.eye(T, dtype=torch.bool, device=real_BT.device)


def log_attention(q_BHTK, k_BGSK, allowed_BTS, scaling: float) -> torch.Tensor:
    """Return log softmax(q k^T * scaling) over the allowed keys, [B, H, T, S], in float32 or better."""
    dtype = torch.promote_types(q_BHTK.dtype, torch.float32)
    q = q_BHTK.to(dtype).unflatten(1, (k_BGSK.shape[1], -1)) * scaling  # [B, G, H/G, T, K]
    scores = (q @ k_BGSK.to(dtype)[:, :, None].transpose(-1, -2)).flatten(1, 2)  # [B, H, T, S]
    return scores.masked_fill(~allowed_BTS[:, None], -torch.inf).log_softmax(-1)


class AttentionLenses:
    """Context manager that collects attention lenses while the model runs one batch loop by loop.

    Attributes:
        sums: name -> [loops, layers, B], summed over real tokens and averaged over heads: attention_entropy, attention_kl,
            head_diversity, head_similarity, gate.
        gate_by_head: [loops, layers, B, H], summed over real tokens.
        cosines: [loops, H, H], summed over real tokens, layers and sequences.
    """

    NAMES = ("attention_entropy", "attention_kl", "head_diversity", "head_similarity", "gate")

    def __init__(self, model: PLTModel, num_loops: int, real_BT: torch.Tensor, document_BT: torch.Tensor):
        config = model.config
        self.model, self.loops, self.w = model, num_loops, config.window_tokens
        self.real, self.allowed = real_BT, who_sees_whom(real_BT, document_BT)
        shape = (num_loops, config.num_hidden_layers, real_BT.shape[0])
        H = config.num_attention_heads
        options: Any = {"dtype": torch.float64, "device": real_BT.device}
        self.sums = {name: torch.zeros(shape, **options) for name in self.NAMES}
        self.gate_by_head = torch.zeros(*shape, H, **options)
        self.cosines = torch.zeros(num_loops, H, H, **options)
        self._before: dict[int, tuple] = {}  # layer -> q, k, g of the loop before
        self._k1: dict[int, torch.Tensor] = {}

    def __enter__(self) -> "AttentionLenses":
        modules = [module for module in self.model.modules() if isinstance(module, PLTAttention)]
        self._hooks = [module.register_forward_pre_hook(self._look, with_kwargs=True) for module in modules]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _look(self, attention: PLTAttention, args: tuple, kwargs: dict) -> None:
        loop, layer = kwargs["loop"], attention.layer_idx
        if loop >= self.loops:
            return
        x_BTD, normed_BTD = args[:2]
        q, k, _ = attention.project(normed_BTD, kwargs["position_embeddings"])
        if loop == 0:
            g, self._k1[layer] = None, k
        else:
            g = attention.gate(x_BTD, q).transpose(1, 2)  # [B, H, T, 1]
            g = g.to(torch.promote_types(g.dtype, torch.float32))
            gate_BHT = g[..., 0] * self.real[:, None]
            self.sums["gate"][loop, layer] += gate_BHT.mean(1).sum(-1)
            self.gate_by_head[loop, layer] += gate_BHT.sum(-1)
        now, before = (q, k, g), self._before.get(layer)
        B, H, T, _ = q.shape
        block = max(1, min(T, BLOCK_BYTES // (B * H * T * 4)))
        for start in range(0, T, block):
            rows = slice(start, min(start + block, T))
            log_a = self._distribution(layer, now, rows, attention.scaling)  # [B, H, block, keys so far]
            real = self.real[:, rows]

            def add(name: str, value_BHt: torch.Tensor, real=real) -> None:
                mean_Bt = value_BHt.mean(1) if value_BHt.ndim == 3 else value_BHt
                self.sums[name][loop, layer] += (mean_Bt * real).sum(-1)

            add("attention_entropy", entropy(log_a))
            if loop > 0 and before is not None:
                add("attention_kl", kl(log_a, self._distribution(layer, before, rows, attention.scaling)))
            diversity_Bt, cosine = head_relations(log_a.exp().transpose(1, 2))
            add("head_diversity", diversity_Bt)
            add("head_similarity", mean_off_diagonal(cosine))
            self.cosines[loop] += (cosine * real[:, :, None, None]).sum((0, 1))
        if loop + 1 < self.loops:
            self._before[layer] = now
        else:  # the last loop of the diagnosis
            self._before.pop(layer, None)
            self._k1.pop(layer, None)

    def _distribution(self, layer: int, of: tuple, rows: slice, scaling: float) -> torch.Tensor:
        """Return log A of a block of queries over the keys up to its end: loop 1's, or the gated mixture."""
        q, k, g = of
        allowed = self.allowed[:, rows, : rows.stop]
        log_global = log_attention(q[:, :, rows], self._k1[layer][:, :, : rows.stop], allowed, scaling)
        if g is None:
            return log_global
        first = max(0, rows.start - self.w)  # earlier keys are in no window of this block
        ahead = torch.arange(rows.start, rows.stop, device=q.device)[:, None] - torch.arange(
            first, rows.stop, device=q.device
        )
        near = allowed[:, :, first:] & (ahead <= self.w)
        log_local = log_attention(q[:, :, rows], k[:, :, first : rows.stop], near, scaling)
        return gated_mixture(log_global, F.pad(log_local, (first, 0), value=-torch.inf), g[:, :, rows])
