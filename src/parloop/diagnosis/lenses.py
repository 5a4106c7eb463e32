"""The lenses: measures of a loop's gain and cost, as functions of states, attention distributions and logits.

Definitions follow LoopCoder-v2 (arXiv 2606.18023, the per-loop diagnostics of its gain-cost analysis). Notation: h_r [.., D] is
loop r's state of a token after the final norm, h_0 the embedding; A_r an attention distribution of loop r over positions;
p_r = softmax(Head(h_r)). Lengths are Euclidean, logarithms natural (nats). Every function returns one value per token, query or
sample; means are taken in diagnosis.py, over real tokens only (and heads and layers), then over samples.

Axes: B sequences, T tokens, S keys, D hidden size, H heads, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Lens:
    """A lens: its title, unit, definition and interpretation, and the first loop that it exists for."""

    title: str
    unit: str
    definition: str
    reads_as: str
    first_loop: int = 1


LENSES = {
    "step_size": Lens("step size", "length", "‖h_r − h_{r−1}‖ per token", "how far the loop moves the state"),
    "angular_change": Lens(
        "angular change",
        "cosine",
        "cos(h_r − h_{r−1}, h_{r−1} − h_{r−2}) per token",
        "1: the loop continues in the same direction; below 0: it undoes part of the loop before",
        2,
    ),
    "effective_rank": Lens(
        "effective rank",
        "directions",
        "exp(entropy of the normalized singular values of the RMS-normalized states of a sample)",
        "diversity of the representation: another loop may pay while it rises",
    ),
    "fixed_point_gap": Lens(
        "fixed-point gap", "length", "‖h_r − f(h_r)‖ per token, f the model's next loop", "remaining refinement"
    ),
    "offset_cost": Lens(
        "offset cost Ω", "length", "‖h_{r−1,i} − h_{r−1,i−1}‖ over neighbours", "distortion by the shift into the loop", 2
    ),
    "attention_entropy": Lens(
        "attention entropy", "nats", "−Σ A_r log A_r per head and query", "low: focused; high: diffuse"
    ),
    "attention_kl": Lens(
        "inter-loop attention KL", "nats", "KL(A_r ‖ A_{r−1}) per head and query", "near 0: the routing is frozen", 2
    ),
    "head_diversity": Lens(
        "head diversity", "heads", "effective rank of the heads × positions matrix of a query", "how many heads differ"
    ),
    "head_similarity": Lens(
        "head similarity", "cosine", "mean cosine between the attention of different heads", "1: heads are redundant"
    ),
    "gate": Lens(
        "gate", "share", "mean g over tokens, heads and layers", "reliance on loop 1's cache; the rest is window", 2
    ),
    "token_rank": Lens(
        "logit-lens rank", "rank", "median rank of the true next token under p_r (1 is best)", "how close the answer is"
    ),
    "output_shift": Lens(
        "output shift Δp", "nats", "KL(p_r ‖ p_{r−1}) per token", "gain of the loop: change of the prediction", 2
    ),
    "output_entropy": Lens("output entropy", "nats", "entropy of p_r per token", "low: confident"),
    "loss": Lens("loss", "nats per token", "−log p_r of the true next token", "loss of this model when run with r loops"),
    "share_output_shift": Lens("share of output shift", "share", "the loop's share of Σ Δp", "where the output moves", 2),
    "share_attention_kl": Lens(
        "share of attention KL", "share", "the loop's share of Σ attention KL", "where the routing moves", 2
    ),
    "share_tokens": Lens(
        "share of tokens", "share", "tokens whose largest Δp is this loop's", "tokens whose prediction this loop decides", 2
    ),
}


# Hidden states


def step_size(h: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return ‖h_r − h_{r−1}‖ of states, [.., D] -> [..].

    If `h` is the state one loop later, this is the fixed-point gap of `before`.
    """
    return (h - before).norm(dim=-1)


def angular_change(h: torch.Tensor, before: torch.Tensor, before_that: torch.Tensor) -> torch.Tensor:
    """Return the cosine between the loop's step and the step before it, [.., D] -> [..]; 0 where a step has no length.

    (A text's first token reads no predecessor, so all loops from 2 on give it the same state.) At loop 2 the step before leads from the
    small embedding to a normed state, so the value is negative for nearly any model: compare it between models, and interpret its sign
    only from loop 3 on.
    """
    step, last = h - before, before - before_that
    still = (step.norm(dim=-1) < 1e-5 * h.norm(dim=-1)) | (last.norm(dim=-1) < 1e-5 * h.norm(dim=-1))
    return F.cosine_similarity(step, last, dim=-1).masked_fill(still, 0.0)


def offset_cost(h: torch.Tensor) -> torch.Tensor:
    """Return ‖h_i − h_{i−1}‖ of neighbours, [.., T, D] -> [.., T-1]: the change from reading the left neighbour's state
    instead of one's own.

    The cost of loop r is that of its input h_{r−1}.
    """
    return (h[..., 1:, :] - h[..., :-1, :]).norm(dim=-1)


def effective_rank(h: torch.Tensor, center: bool = False) -> torch.Tensor:
    """Return exp(entropy of σ / Σσ), a number from 1 to min(n, D); σ are the singular values of h's RMS-normalized rows.

    Args:
        h: states, [n, D].
        center: subtract the mean row first. The paper does not say whether it does; by default the mean is kept.
    """
    rows = F.normalize(h, dim=-1)  # RMS normalization up to a common factor, which cancels in σ / Σσ
    if center:
        rows = rows - rows.mean(0)
    return _spread(torch.linalg.svdvals(rows))


def _spread(sigma: torch.Tensor) -> torch.Tensor:
    """Return exp(entropy) of weights σ [.., k] normalized to one."""
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


# Distributions, as logarithms, so that nothing underflows; -inf marks an impossible outcome


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return −Σ p log p in nats, [.., S] -> [..]."""
    return torch.special.entr(log_p.exp()).sum(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p ‖ q) in nats, [.., S] -> [..]; infinite if p is positive where q is zero."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def gated_mixture(log_global: torch.Tensor, log_local: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return the log of g * global + (1 - g) * local: attention of a token in loop r >= 2, as one distribution over positions.

    The values differ (the global part reads loop 1's, the local part the loop's own), so this shows which positions a loop attends to,
    not what it reads there.
    """
    return torch.logaddexp(g.log() + log_global, (-g).log1p() + log_local)


def head_relations(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the effective rank [..] of every query's heads x positions matrix [.., H, S], and the cosines between its
    heads [.., H, H].

    Rows are used as they are, neither centred nor scaled.
    """
    gram = (attention @ attention.transpose(-1, -2)).double()  # singular values are the square roots of its eigenvalues
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (length[..., :, None] * length[..., None, :])
    return _spread(sigma), cosine


def mean_off_diagonal(cosine: torch.Tensor) -> torch.Tensor:
    """Return the mean over pairs of different heads, [.., H, H] -> [..]; 1 if there is only one head."""
    H = cosine.shape[-1]
    if H == 1:
        return cosine.new_ones(cosine.shape[:-2])
    diagonal = cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (cosine.sum((-1, -2)) - diagonal) / (H * (H - 1))


# Predictions


def token_rank(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the rank of `token` [..] under logits [.., V]: 1 plus the number of tokens that score higher."""
    own = logits.gather(-1, token[..., None])
    return 1 + (logits > own).sum(-1)


def shares(values: torch.Tensor) -> torch.Tensor:
    """Return each loop's share of the sum over loops, [.., loops 2..R]; equal shares if the sum is zero."""
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total.where(total > 0, 1.0), 1.0 / values.shape[-1])
