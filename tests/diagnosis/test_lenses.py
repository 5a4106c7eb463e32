"""Every lens against values computed by hand, on states made for it, in float64."""

import math

import pytest
import torch

from parloop.diagnosis.lenses import (
    LENSES,
    angular_change,
    effective_rank,
    entropy,
    gated_mixture,
    head_relations,
    kl,
    mean_off_diagonal,
    offset_cost,
    shares,
    step_size,
    token_rank,
)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def log_p(*shape):
    """Distributions over the last axis, as logarithms; some outcomes are impossible."""
    x = random(*shape)
    return x.masked_fill(x < -1.5, -torch.inf).log_softmax(-1)


h = random(4, 2, 3, 5, 7)
BATCHES = {  # what a lens reads: two samples of three
    "step_size": (step_size, h[0], h[1]),
    "angular_change": (angular_change, h[0], h[1], h[2]),
    "offset_cost": (offset_cost, h[0]),
    "entropy": (entropy, log_p(2, 3, 5, 7)),
    "kl": (kl, log_p(2, 3, 5, 7), h[0].log_softmax(-1)),
    "gated_mixture": (gated_mixture, log_p(2, 3, 5, 7), h[0].log_softmax(-1), h[1, ..., :1].sigmoid()),
    "head_diversity": (lambda a: head_relations(a)[0], log_p(2, 3, 5, 7).exp()),
    "head_cosines": (lambda a: head_relations(a)[1], log_p(2, 3, 5, 7).exp()),
    "mean_off_diagonal": (mean_off_diagonal, h[0, ..., :5]),
    "token_rank": (token_rank, h[0], h[1, ..., 0].argsort(-1)),
    "shares": (shares, h[0, ..., 0].abs() / 10),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_its_members(name):
    """Every axis in front counts samples: none is summed over, none is taken for another."""
    lens, *batch = BATCHES[name]
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(lens(*batch)[i, j], lens(*(x[i, j] for x in batch)))


def test_step_size_is_a_length():
    assert step_size(t([3.0, 4.0], [1.0, 1.0]), t([0.0, 0.0], [1.0, 0.0])).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("third", "expected"),  # steps of (4, 4), (-1, -1), (1, -1), (2, -1) and (0, 0) after one of (1, 1)
    [((5.0, 5.0), 1.0), ((0.0, 0.0), -1.0), ((2.0, 0.0), 0.0), ((3.0, 0.0), 10**-0.5), ((1.0, 1.0), 0.0)],
)
def test_angular_change(third, expected):
    first, second = t(0.0, 0.0), t(1.0, 1.0)
    assert angular_change(t(*third), second, first).item() == pytest.approx(expected)


def test_angular_change_from_anywhere():
    """Three states that are not at the origin: steps of (1, 0) and (1, 1)."""
    assert angular_change(t(7.0, -4.0), t(6.0, -5.0), t(5.0, -5.0)).item() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_step_that_is_only_rounding_has_no_direction(scale):
    """Measured by the state: of states as small as such a step, it is a step. The others of the sample keep theirs."""
    h = scale * t([1.0, 0.0], [1.0, 0.0], [1.0, 0.0])
    before = h - scale * t([1e-7, 1e-7], [1.0, 0.5], [1.0, 1.0])
    before_that = before - scale * t([1.0, 1.0], [1e-7, 1e-7], [1.0, 1.0])
    assert angular_change(h, before, before_that).tolist() == pytest.approx([0.0, 0.0, 1.0])
    h, before, before_that = (
        torch.cat((states, 1e7 * states[:1])) for states in (h, before, before_that)
    )  # a large token beside them
    assert angular_change(h, before, before_that).tolist() == pytest.approx([0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_effective_rank_of_k_equal_orthogonal_directions_is_k(k):
    rows = torch.eye(8, dtype=torch.float64)[:k].repeat(4, 1) * torch.linspace(0.5, 3, 4 * k, dtype=torch.float64)[:, None]
    assert effective_rank(rows).item() == pytest.approx(k)  # lengths of rows do not count: they are RMS-normalized


def test_effective_rank_weighs_singular_values():
    """Three rows along x and one along y: singular values sqrt(3) and 1."""
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    rows = t([1.0, 0], [2.0, 0], [5.0, 0], [0, 7.0])
    assert effective_rank(rows).item() == pytest.approx(expected)


def test_effective_rank_centred_forgets_the_mean():
    rows = t([1.0, 0.1], [1.0, -0.1])
    assert effective_rank(rows).item() > 1.2
    assert effective_rank(rows, center=True).item() == pytest.approx(1.0)
    corners = t([1.0, 1.0, 9.0], [1.0, -1.0, 9.0], [-1.0, 1.0, 9.0], [-1.0, -1.0, 9.0])
    assert effective_rank(corners, center=True).item() == pytest.approx(2.0)


def test_effective_rank_of_nothing():
    assert effective_rank(torch.zeros(3, 4)).item() == 1.0


def test_offset_cost_of_identical_and_of_known_neighbours():
    assert offset_cost(t([1.0, 2.0], [1.0, 2.0], [1.0, 2.0])).tolist() == [0, 0]
    assert offset_cost(t([0.0, 0.0], [3.0, 4.0], [3.0, 0.0])).tolist() == [5, 4]


@pytest.mark.parametrize("n", [1, 3, 64])
def test_entropy_of_uniform_attention_over_n_keys_is_log_n(n):
    log_p = torch.full((2, 100), -torch.inf, dtype=torch.float64)
    log_p[:, :n] = -math.log(n)
    assert entropy(log_p).tolist() == pytest.approx([math.log(n)] * 2)


def test_kl_by_hand():
    p, q = t(0.5, 0.5, 0.0), t(0.25, 0.5, 0.25)
    assert kl(p.log(), p.log()).item() == 0
    assert kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2))
    assert kl(q.log(), p.log()).item() == math.inf


def test_gated_mixture_by_hand_and_at_the_ends():
    a, b = t(0.5, 0.5, 0.0).log(), t(0.0, 0.2, 0.8).log()
    assert gated_mixture(a, b, t(0.25)).exp().tolist() == pytest.approx([0.125, 0.275, 0.6])
    assert gated_mixture(a, b, t(1.0)).exp().tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert gated_mixture(a, b, t(0.0)).exp().tolist() == pytest.approx([0.0, 0.2, 0.8])


def test_head_relations_of_equal_disjoint_and_mixed_heads():
    same, apart = t([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]), t([1.0, 0, 0, 0], [0, 0, 1.0, 0])
    diversity, cosine = head_relations(torch.stack([same, apart]))
    assert diversity.tolist() == pytest.approx([1, 2], abs=1e-6)
    assert mean_off_diagonal(cosine).tolist() == pytest.approx([1, 0])
    _, cosine = head_relations(t([1.0, 0], [0.5, 0.5]))
    assert cosine[0, 1].item() == pytest.approx(math.sqrt(0.5))
    assert mean_off_diagonal(torch.ones(3, 1, 1)).tolist() == [1, 1, 1]


def test_equal_heads_are_one_head_in_single_precision():
    """Rounding makes an eigenvalue of zero one of either sign, and its root is large."""
    heads = torch.rand(20, 1, 30).softmax(-1).expand(20, 8, 30)
    assert head_relations(heads)[0].tolist() == pytest.approx([1.0] * 20, abs=1e-5)


def test_mean_off_diagonal_by_hand():
    cosine = t([1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0])
    assert mean_off_diagonal(cosine).item() == pytest.approx(0.4)


def test_head_diversity_agrees_with_singular_values():
    a = torch.rand(5, 7, 30, dtype=torch.float64).softmax(-1)
    sigma = torch.linalg.svdvals(a)
    p = sigma / sigma.sum(-1, keepdim=True)
    torch.testing.assert_close(head_relations(a)[0], (-(p * p.log()).sum(-1)).exp(), rtol=1e-6, atol=0)


def test_token_rank_counts_what_scores_higher():
    logits = t(0.1, 3.0, 2.0, 2.0)
    ranks = [token_rank(logits, torch.tensor(i)).item() for i in range(4)]
    assert ranks == [4, 1, 2, 2]


def test_shares_add_up_and_nothing_is_shared_evenly():
    assert shares(t([3.0, 1.0], [0.0, 0.0])).tolist() == [[0.75, 0.25], [0.5, 0.5]]
    assert shares(t([0.03, 0.01], [0.0, 0.0], [2e-12, 0.0])).tolist() == [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]
    assert shares(t(0.0, 0.0, 0.0)).tolist() == pytest.approx([1 / 3] * 3)


def test_every_lens_says_what_it_is():
    assert (LENSES["gate"].title, LENSES["loss"].title) == ("gate", "loss")
    assert {name: (lens.unit, lens.first_loop) for name, lens in LENSES.items()} == {
        "step_size": ("length", 1),
        "angular_change": ("cosine", 2),
        "effective_rank": ("directions", 1),
        "fixed_point_gap": ("length", 1),
        "offset_cost": ("length", 2),
        "attention_entropy": ("nats", 1),
        "attention_kl": ("nats", 2),
        "head_diversity": ("heads", 1),
        "head_similarity": ("cosine", 1),
        "gate": ("share", 2),
        "token_rank": ("rank", 1),
        "output_shift": ("nats", 2),
        "output_entropy": ("nats", 1),
        "loss": ("nats per token", 1),
        "share_output_shift": ("share", 2),
        "share_attention_kl": ("share", 2),
        "share_tokens": ("share", 2),
    }
    for lens in LENSES.values():
        assert len({lens.title, lens.definition, lens.reads_as}) == 3
        assert all((lens.title, lens.definition, lens.reads_as))
        with pytest.raises(AttributeError):  # one table for everybody
            lens.first_loop = 1
