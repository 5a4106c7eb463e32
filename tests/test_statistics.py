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


def test_intervals_are_plain_numbers():
    """Which JSON and YAML can hold."""
    weights = resample_weights(2, 1, rng())
    for interval in (bits_per_byte(np.ones((1, 2)), np.array([1, 2]), weights), bootstrap_mean(np.arange(3.0))):
        assert {type(number) for number in interval.as_list()} == {float}


def test_seeds_count_alike():
    """Check the ratio of all seeds' losses to all bytes that they read, and its interval against materialised resamples."""
    sizes = np.array([100, 300])
    bits = np.array([[1.0, 2.0], [1.5, 2.5], [5.0, 6.0]]) * sizes
    weights = resample_weights(2, 3, rng())
    laid_out = weights.by_seed[:, :, None] * weights.by_document.astype(int)[:, None, :]
    resampled = (laid_out * bits).sum((1, 2)) / (laid_out * sizes).sum((1, 2))
    expected = [(1.75 + 2.25 + 5.75) / 3, *np.quantile(resampled, [0.025, 0.975])]
    assert bits_per_byte(bits * math.log(2), sizes, weights).as_list() == pytest.approx(expected)


def test_the_interval_of_a_mean():
    """A draw of two from two values has one of them twice, or both; many values give about the normal distribution's interval."""
    assert bootstrap_mean(np.array([1.0, 4.0])).as_list() == [2.5, 1.0, 4.0]
    values = rng().normal(3.0, 2.0, 400)
    error = 1.96 * values.std() / math.sqrt(400)
    expected = [values.mean(), values.mean() - error, values.mean() + error]
    assert bootstrap_mean(values).as_list() == pytest.approx(expected, abs=0.02)
    again = [bootstrap_mean(values[:n]) for n in (400, 10, 20, 30, 40, 50, 400)]
    assert again[0] == again[-1]  # the same resamples for everybody, kept or drawn anew


def test_one_value_has_no_interval():
    interval = bootstrap_mean(np.array([7.0]))
    assert interval.value == 7.0
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_large_documents_weigh_more():
    sizes = np.array([100, 300])
    nll = np.array([[1.0, 2.0]]) * sizes * math.log(2)
    assert bits_per_byte(nll, sizes, resample_weights(2, 1, rng())).value == pytest.approx(1.75)


def test_the_interval_covers_the_truth():
    """In 200 samples of documents, about 95% of the intervals contain the true mean."""
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
    """Compare with the expanded product."""
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
