"""Majorities, shares and their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from calumma.platform.evaluation.metrics.intervals import bootstrap, wilson

V = TypeVar("V", bound=Hashable)
RESAMPLES = 4000


def majority(votes: Sequence[V]) -> V | None:
    """What more than half of them say; None where nothing has so many votes."""
    if not votes:
        return None
    value, count = Counter(votes).most_common(1)[0]
    return value if 2 * count > len(votes) else None


@dataclass(frozen=True)
class Share:
    """A share of `total`, with its interval of 95 %. All are 0 where there is nothing to count."""

    count: float
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else 0.0


def share(count: int, total: int) -> Share:
    """Wilson's interval (J. Am. Stat. Assoc. 22, 1927): right also near 0 and 1, and for small counts."""
    if not total:
        return Share(0, 0, 0.0, 0.0)
    low, high = wilson(count, total)
    return Share(count, total, low, high)


def mean_share(values: Sequence[float]) -> Share:
    """The mean of values between 0 and 1, say wins with ties counted half; its interval by resampling them, always in
    the same way."""
    if not values:
        return Share(0, 0, 0.0, 0.0)
    given = np.asarray(values, dtype=np.float64)
    if np.all(given == given[0]):  # resampling would be sure of it
        count = round(float(given.sum()))
        sure = share(count, len(given)) if given[0] in (0.0, 1.0) else share(round(len(given) / 2), len(given))
        return Share(float(given.sum()), len(given), sure.low, sure.high)
    low, high = bootstrap(values, resamples=RESAMPLES)
    return Share(float(given.sum()), len(given), low, high)


@dataclass(frozen=True)
class Duel:
    """The first of two systems against the second. `undecided`: items whose judges had no majority; they are ties."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    undecided: int
    rate: Share  # wins, with ties counted half


def duel(first: str, second: str, votes: Sequence[Sequence[str | None]]) -> Duel:
    """votes: of each item, the systems preferred by its judges, None for about the same."""
    results = [majority([vote or "" for vote in item]) for item in votes if item]
    scores = [{first: 1.0, second: 0.0}.get(result or "", 0.5) for result in results]
    return Duel(
        first,
        second,
        wins=scores.count(1.0),
        ties=scores.count(0.5),
        losses=scores.count(0.0),
        undecided=results.count(None),
        rate=mean_share(scores),
    )
