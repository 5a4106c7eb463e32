"""Intervals over documents, samples and seeds, and the rule that turns them into a loop count."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000
CHUNK = 500  # resamples at once


class Interval(NamedTuple):
    """A value with its 95% bootstrap interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return value, low and high."""
        return [self.value, self.low, self.high]


@dataclass
class Resamples:
    """Bootstrap resamples, as counts of seeds and of documents.

    The count of a seed's document is the product of the two. It is never materialised, since it would take gigabytes.

    Attributes:
        by_seed: count of each seed in each resample, [resamples, seeds].
        by_document: count of each document in each resample, [resamples, documents].
    """

    by_seed: np.ndarray
    by_document: np.ndarray

    def __getitem__(self, some: slice) -> "Resamples":
        return Resamples(self.by_seed[some], self.by_document[some])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of `values` [seeds, documents], weighted by the counts of each resample: [resamples]."""
        by_seed = [self.by_document[i : i + CHUNK].astype(float) @ values.T for i in range(0, len(self.by_document), CHUNK)]
        return (self.by_seed * np.concatenate(by_seed)).sum(1)


def resample_weights(documents: int, seeds: int, rng: np.random.Generator) -> Resamples:
    """Draw resamples of documents, and of seeds if there are several, with replacement.

    With several seeds, the interval covers the luck of training too, not only the choice of documents.

    Args:
        documents: number of documents.
        seeds: number of seeds.
        rng: source of random numbers.

    Raises:
        ValueError: there are no documents or no seeds.
    """
    if documents < 1 or seeds < 1:
        raise ValueError(f"there are {documents} documents and {seeds} seeds: at least one of each is needed.")
    share = np.full(documents, 1 / documents)
    kind = np.min_scalar_type(documents)
    chunks = [rng.multinomial(documents, share, size=CHUNK).astype(kind) for _ in range(RESAMPLES // CHUNK)]
    return Resamples(rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES), np.concatenate(chunks))


def bootstrap_mean(values: np.ndarray) -> Interval:
    """Return the mean of values [n], with its 95% bootstrap interval; for a single value the interval is NaN.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there are no values to take a mean of.")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    return Interval(mean, *_limits(_resamples_of(len(values)) @ values))


@lru_cache(maxsize=4)
def _resamples_of(n: int) -> np.ndarray:
    """Return the weights [RESAMPLES, n] of a bootstrapped mean, the same ones for every mean of n values."""
    return resample_weights(n, 1, np.random.default_rng(0)).by_document / n


def bits_per_byte(nll: np.ndarray, byte_counts: np.ndarray, weights: Resamples) -> Interval:
    """Compute bits per byte.

    Args:
        nll: negative log-likelihood in nats, [seeds, documents].
        byte_counts: bytes of each document, [documents].
        weights: the resamples.

    Returns:
        the value over all seeds and documents, and the 95% interval of its resamples.
    """
    return Interval(_ratio(nll, byte_counts), *_limits(_resampled(nll, byte_counts, weights)))


def mean_over(values: np.ndarray, weights: Resamples) -> Interval:
    """Return the mean of values [seeds, documents] and the 95% interval of its resamples."""
    return Interval(float(values.mean()), *_limits(weights.sums(values) / weights.sums(np.ones_like(values))))


def paired_difference(nll: np.ndarray, other: np.ndarray, byte_counts: np.ndarray, weights: Resamples) -> Interval:
    """Compute the difference of two models' losses on the same documents and seeds, in bits per byte.

    Args:
        nll: negative log-likelihood of one model in nats, [seeds, documents].
        other: that of the other model, likewise.
        byte_counts: bytes of each document, [documents].
        weights: the resamples.

    Returns:
        nll minus other, and the 95% interval of its resamples; below 0, nll is better.
    """
    return bits_per_byte(nll - other, byte_counts, weights)


def _ratio(nll, byte_counts) -> float:
    return float(nll.sum() / math.log(2) / (byte_counts.sum() * len(nll)))


def _resampled(nll, byte_counts, weights) -> np.ndarray:
    return weights.sums(nll) / math.log(2) / weights.sums(np.broadcast_to(byte_counts, nll.shape))


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def wilson(passed: float, n: int) -> Interval:
    """Return the share of items that passed, with Wilson's 95% interval, which is valid for few items and near 0 and 1 too.

    Raises:
        ValueError: there are no items, or more passed than there are.
    """
    if n < 1 or not 0 <= passed <= n:
        raise ValueError(f"{passed} of {n} items passed: there must be at least one item, and at most all can pass.")
    share, z = passed / n, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    """Return the two-sided p-value of McNemar's exact test that two models pass equally often on the same items.

    Items that both pass or both fail carry no information; under the hypothesis, each model wins half of the others.

    Args:
        one: whether the one model passes, bool [items].
        other: whether the other model passes, bool [items].

    Raises:
        ValueError: the numbers of items differ.
    """
    if one.shape != other.shape:
        raise ValueError(f"one has items {one.shape}, the other {other.shape}: give the same items for both.")
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


RULE = "the smallest loop count whose loss lies within the paired 95% interval of the best"


def choose(losses: dict[Any, float], differences: dict[Any, Interval]) -> Any:
    """Return the name of the recommended model: the first, and so the cheapest, whose difference to the best reaches zero.

    Args:
        losses: name -> bits per byte, from the cheapest model to the dearest.
        differences: name -> its loss minus the best one's, paired.

    Raises:
        ValueError: there are no models, or one has no difference.
    """
    if not losses or losses.keys() - differences.keys():
        raise ValueError(f"there are losses of {list(losses)} and differences of {list(differences)}: each needs both.")
    return next(name for name in losses if differences[name].low <= 0.0)
