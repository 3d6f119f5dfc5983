"""How sure a figure is: Wilson's interval of a share, the bootstrap's of a mean, and paired tests of two runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # of 95 %
RESAMPLES = 2000
MOST_PERMUTED = 100_000


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right: float, count: int) -> Interval:
    """Of a share, 95 %: right even at 0, at 1 and for few. Raises ValueError for none."""
    if count <= 0 or not 0 <= right <= count:
        raise ValueError(f"{right} of {count} is no share")
    share, z2 = right / count, Z**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    low = 0.0 if right == 0 else middle - half
    return Interval(low, 1.0 if right == count else middle + half)


def bootstrap(
    values: Sequence[float],
    seed: int = 0,
    statistic: Callable[[NDArray[np.intp]], float] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """Of the mean of values, 95 %, by percentiles; of another statistic of the items' numbers where one is given."""
    count = len(values)
    if not count:
        raise ValueError("no values, no interval")
    random = np.random.default_rng(seed)
    array = np.asarray(values, float)
    found = np.empty(resamples)
    for number in range(resamples):
        drawn = random.integers(0, count, count)
        found[number] = array[drawn].mean() if statistic is None else statistic(drawn)
    return Interval(float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975)))


def of_mean(values: Sequence[float], shares: bool = True, seed: int = 0) -> Interval | None:
    """Wilson's where every value is right or wrong, else the bootstrap's. Of values that are no `shares` (CIDEr,
    decibels), which have no bounds, 0 and 1 are figures like others, and values that are all the same tell none."""
    if shares and set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    return bootstrap(values, seed) if shares or len(set(values)) > 1 else None


class Comparison(NamedTuple):
    """Of the same items in two runs: the second's mean less the first's, its interval, and how likely such a difference
    would be if nothing differed."""

    difference: float
    interval: Interval
    p: float
    test: str


def compare(first: Sequence[float], second: Sequence[float], shares: bool = True, seed: int = 0) -> Comparison:
    """A paired test: McNemar's exact one where all is right or wrong (of `shares`), else of random signs of the
    differences."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values do not pair")
    differences = np.asarray(second, float) - np.asarray(first, float)
    interval = bootstrap(differences.tolist(), seed)
    if shares and {*first, *second} <= {0.0, 1.0}:
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        return Comparison(float(differences.mean()), interval, mcnemar(better, worse), "McNemar's exact test")
    return Comparison(float(differences.mean()), interval, _random_signs(differences, seed), "permutation test")


def mcnemar(better: int, worse: int) -> float:
    """Exact and two-sided: of a fair coin thrown for each item on which the two differ."""
    count = better + worse
    if not count:
        return 1.0
    few = min(better, worse)
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def _random_signs(differences: NDArray[np.float64], seed: int) -> float:
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    random = np.random.default_rng(seed)
    observed, count, extreme = abs(differences.sum()), 0, 0
    rounds = min(MOST_PERMUTED, max(2000, 2_000_000 // len(differences)))
    while count < rounds:
        signs = random.choice((-1.0, 1.0), (min(1000, rounds - count), len(differences)))
        extreme += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
        count += len(signs)
    return (extreme + 1) / (count + 1)
