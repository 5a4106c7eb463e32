"""Intervals and the rule."""

import math

import numpy as np
import pytest

from parloop.statistics import (
    Interval,
    bits_per_byte,
    bootstrap_mean,
    choose,
    mcnemar,
    paired_difference,
    resample_weights,
    wilson,
)


def rng():
    return np.random.default_rng(0)


def test_bits_per_byte_of_a_constant_loss():
    """Two bits for every byte of every document: no uncertainty at all."""
    sizes = np.array([10, 200, 3000])
    nll = 2 * math.log(2) * sizes[None].astype(float)
    interval = bits_per_byte(nll, sizes, resample_weights(3, 1, rng()))
    assert interval.as_list() == pytest.approx([2.0, 2.0, 2.0])


def test_large_documents_weigh_more():
    sizes = np.array([100, 300])
    nll = np.array([[1.0, 2.0]]) * sizes * math.log(2)
    assert bits_per_byte(nll, sizes, resample_weights(2, 1, rng())).value == pytest.approx(1.75)


def test_the_interval_covers_the_truth():
    """Of 200 samples of documents, about 95% of the intervals hold the mean they were drawn around."""
    generator, hits = rng(), 0
    sizes = np.full(60, 100)
    for _ in range(200):
        nll = generator.normal(2.0, 0.5, (1, 60)) * sizes * math.log(2)
        interval = bits_per_byte(nll, sizes, resample_weights(60, 1, generator)[:1000])
        hits += interval.low <= 2.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_removes_what_documents_have_in_common():
    """Documents differ a lot, the two models by a constant: the paired interval is narrow, the unpaired ones overlap."""
    sizes = np.full(40, 100)
    weights = resample_weights(40, 1, rng())
    base = rng().normal(2.0, 1.0, (1, 40)) * sizes * math.log(2)
    better = base - 0.05 * sizes * math.log(2)
    difference = paired_difference(better, base, sizes, weights)
    assert difference.as_list() == pytest.approx([-0.05, -0.05, -0.05])
    one, two = bits_per_byte(base, sizes, weights), bits_per_byte(better, sizes, weights)
    assert two.high > one.low


def test_weights_of_every_document_of_every_seed():
    """Against the product laid out."""
    weights = resample_weights(7, 3, rng())
    laid_out = weights.by_seed[:, :, None] * weights.by_document.astype(int)[:, None, :]
    assert laid_out.shape == (10_000, 3, 7)
    assert (laid_out.sum((1, 2)) == 21).all()
    values = rng().normal(size=(3, 7))
    np.testing.assert_allclose(weights.sums(values), (laid_out * values).sum((1, 2)))


def test_many_documents_take_little_memory():
    import tracemalloc

    nll = np.ones((3, 2000))
    tracemalloc.start()
    bits_per_byte(nll, np.full(2000, 10), resample_weights(2000, 3, rng()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # laid out: 480 MB


def test_seeds_widen_the_interval():
    sizes = np.full(40, 100)
    nll = np.repeat(np.array([[1.9], [2.0], [2.1]]), 40, axis=1) * sizes * math.log(2)
    one = bits_per_byte(nll[1:2], sizes, resample_weights(40, 1, rng()))
    three = bits_per_byte(nll, sizes, resample_weights(40, 3, rng()))
    assert one.high - one.low == pytest.approx(0.0, abs=1e-12)
    assert three.high - three.low > 0.1


@pytest.mark.parametrize(
    ("losses", "lows", "expected"),
    [
        ({1: 2.0, 2: 1.8, 3: 1.7}, {1: 0.2, 2: 0.05, 3: 0.0}, 3),  # each clearly better than the last
        ({1: 2.0, 2: 1.71, 3: 1.7}, {1: 0.2, 2: -0.01, 3: 0.0}, 2),  # three are not clearly better than two
        ({1: 1.6, 2: 1.8, 3: 1.9}, {1: 0.0, 2: 0.1, 3: 0.2}, 1),  # loops hurt
        ({1: 1.705, 2: 1.71, 3: 1.7}, {1: -0.01, 2: -0.01, 3: 0.0}, 1),  # nothing to tell them apart
    ],
)
def test_the_rule(losses, lows, expected):
    assert choose(losses, {n: Interval(losses[n] - min(losses.values()), lows[n], 1.0) for n in losses}) == expected


def test_nothing_is_said_of_nothing():
    """And not a warning, a NaN or a number of somebody else's."""
    for call, message in [
        (lambda: bootstrap_mean(np.array([])), "there are no values"),
        (lambda: resample_weights(0, 1, rng()), "0 documents and 1 seeds"),
        (lambda: resample_weights(3, 0, rng()), "3 documents and 0 seeds"),
        (lambda: wilson(0, 0), "0 of 0 items"),
        (lambda: wilson(-1, 5), "-1 of 5 items"),
        (lambda: wilson(6, 5), "6 of 5 items"),
        (lambda: mcnemar(np.array([True]), np.array([True, False])), r"items \(1,\), the other \(2,\)"),
        (lambda: choose({}, {}), r"losses of \[\]"),
        (lambda: choose({1: 2.0, 2: 1.9}, {1: Interval(0.1, 0.0, 0.2)}), r"losses of \[1, 2\] and differences of \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
