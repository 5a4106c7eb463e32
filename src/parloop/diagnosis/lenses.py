"""The lenses: what a loop adds and what it costs, as functions of states, attention distributions and logits.

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
    """What a lens is called, measured in, and read as; and the first loop that it exists for."""

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
        "1: the loop goes on in the same direction; below 0: it takes back what the last one did",
        2,
    ),
    "effective_rank": Lens(
        "effective rank",
        "directions",
        "exp(entropy of the normalized singular values of the RMS-normalized states of a sample)",
        "diversity of the representation: another loop may pay while it rises",
    ),
    "fixed_point_gap": Lens(
        "fixed-point gap", "length", "‖h_r − f(h_r)‖ per token, f the model's next loop", "refinement that is left"
    ),
    "offset_cost": Lens(
        "offset cost Ω", "length", "‖h_{r−1,i} − h_{r−1,i−1}‖ over neighbours", "what the shift into the loop distorts", 2
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
        "output shift Δp", "nats", "KL(p_r ‖ p_{r−1}) per token", "the gain of the loop: what it changes", 2
    ),
    "output_entropy": Lens("output entropy", "nats", "entropy of p_r per token", "low: confident"),
    "loss": Lens("loss", "nats per token", "−log p_r of the true next token", "what running this model with r loops gives"),
    "share_output_shift": Lens("share of output shift", "share", "the loop's share of Σ Δp", "where the output moves", 2),
    "share_attention_kl": Lens(
        "share of attention KL", "share", "the loop's share of Σ attention KL", "where the routing moves", 2
    ),
    "share_tokens": Lens(
        "share of tokens", "share", "tokens whose largest Δp is this loop's", "whose prediction this loop decides", 2
    ),
}


# Hidden states


def step_size(h: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """‖h_r − h_{r−1}‖ of states [.., D]. With `h` one more loop on, this is the fixed-point gap of `before`."""
    return (h - before).norm(dim=-1)


def angular_change(h: torch.Tensor, before: torch.Tensor, before_that: torch.Tensor) -> torch.Tensor:
    """Cosine between the loop's step and the step before it, of states [.., D]; 0 where a step has no length.

    (A text's first token reads no predecessor, so all loops from 2 on give it the same state.) At loop 2 the step before leads
    from the small embedding to a normed state, so the value is negative for nearly any model: compare it between models, and
    read its sign from loop 3 on.
    """
    step, last = h - before, before - before_that
    still = (step.norm(dim=-1) < 1e-5 * h.norm(dim=-1)) | (last.norm(dim=-1) < 1e-5 * h.norm(dim=-1))
    return F.cosine_similarity(step, last, dim=-1).masked_fill(still, 0.0)


def offset_cost(h: torch.Tensor) -> torch.Tensor:
    """‖h_i − h_{i−1}‖ of neighbours, [.., T, D] -> [.., T-1]: what reading the left neighbour's state instead of one's own
    changes. The cost of loop r is that of its input h_{r−1}."""
    return (h[..., 1:, :] - h[..., :-1, :]).norm(dim=-1)


def effective_rank(h: torch.Tensor, center: bool = False) -> torch.Tensor:
    """exp(entropy of σ / Σσ), σ the singular values of the RMS-normalized rows of h [n, D]: a number from 1 to min(n, D).

    Args:
        center: subtract the mean row first. The paper does not say; by default it is kept.
    """
    rows = F.normalize(h, dim=-1)  # RMS normalization up to a common factor, which σ / Σσ does not see
    if center:
        rows = rows - rows.mean(0)
    return _spread(torch.linalg.svdvals(rows))


def _spread(sigma: torch.Tensor) -> torch.Tensor:
    """exp(entropy) of weights σ [.., k] normalized to one."""
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.special.entr(share).sum(-1).exp()


# Distributions, as logarithms, so that nothing underflows; -inf is an impossible outcome


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """−Σ p log p in nats, [.., S] -> [..]."""
    return torch.special.entr(log_p.exp()).sum(-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats, [.., S] -> [..]. Infinite if p is possible where q is not."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def gated_mixture(log_global: torch.Tensor, log_local: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """log of g * global + (1 - g) * local: what a token of loop r >= 2 reads, as one distribution over positions.

    The values differ (the global part reads loop 1's, the local part the loop's own), so this is where a loop looks, not what
    it finds there.
    """
    return torch.logaddexp(g.log() + log_global, (-g).log1p() + log_local)


def head_relations(attention: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the heads x positions matrix of every query, [.., H, S]: its effective rank [..], and the cosines between heads
    [.., H, H]. Rows are used as they are, neither centred nor scaled."""
    gram = (attention @ attention.transpose(-1, -2)).double()  # singular values are the roots of its eigenvalues
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosine = gram / (length[..., :, None] * length[..., None, :])
    return _spread(sigma), cosine


def mean_off_diagonal(cosine: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of different heads, [.., H, H] -> [..]; 1 if there is one head only."""
    H = cosine.shape[-1]
    if H == 1:
        return cosine.new_ones(cosine.shape[:-2])
    diagonal = cosine.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (cosine.sum((-1, -2)) - diagonal) / (H * (H - 1))


# Predictions


def token_rank(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Rank of `token` [..] under logits [.., V]: 1 plus the number of tokens that score higher."""
    own = logits.gather(-1, token[..., None])
    return 1 + (logits > own).sum(-1)


def shares(values: torch.Tensor) -> torch.Tensor:
    """Each loop's share of the sum over loops, [.., loops 2..R]; equal shares if there is nothing to share."""
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total.where(total > 0, 1.0), 1.0 / values.shape[-1])
