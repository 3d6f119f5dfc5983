"""How far annotators agree: how many of them say the same, Krippendorff's alpha, Fleiss' kappa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal"]


@dataclass(frozen=True)
class Agreement:
    """`shares`: of the items with as many votes as most have, those where so many said the same, by how many; 1: all
    different. Alpha and kappa are None where they are not defined: nobody differs in what they say, or nobody judged an
    item that somebody else did."""

    items: int
    votes: int  # that an item of `shares` has
    shares: dict[int, float]
    alpha_nominal: float | None
    alpha_ordinal: float | None
    kappa: float | None


def agreement(votes: Sequence[Sequence[str]], values: Sequence[str]) -> Agreement:
    """votes: what was said of each item. values: all that can be said, in their order."""
    counts = table(votes, values)
    counts = counts[counts.sum(axis=1) > 0]
    several = counts[counts.sum(axis=1) > 1]
    sizes, numbers = np.unique(several.sum(axis=1), return_counts=True)
    usual = int(sizes[numbers.argmax()]) if len(sizes) else 0
    full = several[several.sum(axis=1) == usual]
    most = full.max(axis=1) if len(full) else np.zeros(0, dtype=int)
    return Agreement(
        items=len(counts),
        votes=usual,
        shares={number: float((most == number).mean()) for number in range(usual, 0, -1)} if len(full) else {},
        alpha_nominal=alpha(counts, "nominal"),
        alpha_ordinal=alpha(counts, "ordinal"),
        kappa=fleiss_kappa(full) if len(full) else None,
    )


def table(votes: Sequence[Sequence[str]], values: Sequence[str]) -> np.ndarray:
    """How often each value was said of each item: [items, values]."""
    place = {value: number for number, value in enumerate(values)}
    counts = np.zeros((len(votes), len(values)), dtype=np.int64)
    for item, said in enumerate(votes):
        for value in said:
            counts[item, place[value]] += 1
    return counts


def alpha(counts: np.ndarray, level: Level) -> float | None:
    """Krippendorff's alpha of [items, values] counts, whose values are in their order."""
    import krippendorff

    comparable = counts[counts.sum(axis=1) > 1]
    if not len(comparable) or (comparable.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=comparable, level_of_measurement=level))


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Of [items, values] counts, every item with the same number of votes (Fleiss, Psychol. Bull. 76, 1971)."""
    votes = int(counts[0].sum())
    if votes < 2:
        return None
    shares = counts.sum(axis=0) / counts.sum()
    by_chance = float((shares**2).sum())
    if by_chance > 1 - 1e-12:
        return None
    found = float(((counts**2).sum(axis=1) - votes).mean()) / (votes * (votes - 1))
    return (found - by_chance) / (1 - by_chance)
