"""Intervals over documents, samples and seeds, and the rule that turns them into a loop count."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000


@dataclass
class Interval:
    """A value with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]


def resample_weights(documents: int, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """How often each (seed, document) counts in each resample, [RESAMPLES, seeds, documents].

    Documents are drawn with replacement, and so are seeds if there are several: the interval then covers the luck of
    training too, not only that of the documents.
    """
    by_document = rng.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return by_seed[:, :, None] * by_document[:, None, :]


def bootstrap_mean(values: np.ndarray) -> Interval:
    """Mean of values [n] and its interval over draws of n with replacement. One value has no interval: NaN."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    return Interval(mean, *_limits(_resamples_of(len(values)) @ values))


@lru_cache(maxsize=4)
def _resamples_of(n: int) -> np.ndarray:
    """Weights [RESAMPLES, n] of a bootstrapped mean, the same ones for every mean of n values."""
    return resample_weights(n, 1, np.random.default_rng(0))[:, 0] / n


def bits_per_byte(nll: np.ndarray, byte_counts: np.ndarray, weights: np.ndarray) -> Interval:
    """Of nll [seeds, documents] in nats over byte_counts [documents]."""
    return Interval(_ratio(nll, byte_counts), *_limits(_resampled(nll, byte_counts, weights)))


def paired_difference(nll: np.ndarray, other: np.ndarray, byte_counts: np.ndarray, weights: np.ndarray) -> Interval:
    """nll minus other, in bits per byte, on the same documents and seeds."""
    return bits_per_byte(nll - other, byte_counts, weights)


def _ratio(nll, byte_counts) -> float:
    return float(nll.sum() / math.log(2) / (byte_counts.sum() * len(nll)))


def _resampled(nll, byte_counts, weights) -> np.ndarray:
    return (weights * nll).sum((1, 2)) / math.log(2) / (weights * byte_counts).sum((1, 2))


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


RULE = "the smallest loop count whose loss lies within the paired 95% interval of the best"


def choose(losses: dict[int, float], differences: dict[int, Interval]) -> int:
    """The recommended loop count.

    Args:
        losses: loop count -> bits per byte.
        differences: loop count -> its loss minus the best one's, paired.
    """
    return min(loops for loops in losses if differences[loops].low <= 0.0)
