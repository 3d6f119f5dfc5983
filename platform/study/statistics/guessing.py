"""Annotators who may have guessed: who agrees with the others no better than by chance, always says the same, or is
faster than anybody reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHUFFLES = 2000
UNLIKELY = 0.01  # so likely would a guesser agree so well by chance
FEWEST = 20  # items shared with others, below which nothing is said
ALWAYS = 0.95
HASTY = 3.0  # seconds of a judgement, in the middle


@dataclass(frozen=True)
class Reliability:
    """`agrees`: share of the others' votes on the same items that are like the annotator's. `by_chance`: that share if
    their votes were dealt to their items anew. `likely`: how often that is as good."""

    annotator: str
    items: int
    agrees: float | None
    by_chance: float | None
    likely: float | None
    seconds: float | None
    flags: tuple[str, ...]


def reliability(
    votes: Mapping[str, Mapping[str, str]], values: Sequence[str], seconds: Mapping[str, Sequence[float]] | None = None
) -> list[Reliability]:
    """votes: what each annotator says of each item, about the answers themselves, not about sides."""
    place = {value: number for number, value in enumerate(values)}
    counts: dict[str, np.ndarray] = {}
    for said in votes.values():
        for item, value in said.items():
            counts.setdefault(item, np.zeros(len(values)))[place[value]] += 1
    return [_one(name, said, counts, place, (seconds or {}).get(name, ())) for name, said in sorted(votes.items())]


def _one(
    name: str,
    said: Mapping[str, str],
    counts: Mapping[str, np.ndarray],
    place: Mapping[str, int],
    took: Sequence[float],
) -> Reliability:
    middle = float(np.median(took)) if len(took) else None
    flags = []
    if len(said) >= FEWEST:
        value, times = Counter(said.values()).most_common(1)[0]
        if times >= ALWAYS * len(said):
            flags.append(f"says {value!r} of {times / len(said):.0%} of the items")
    if middle is not None and middle < HASTY and len(took) >= FEWEST:
        flags.append(f"takes {middle:.1f} s for a judgement")
    mine, others = [], []
    for item, value in said.items():
        rest = counts[item].copy()
        rest[place[value]] -= 1
        if rest.sum() > 0:
            mine.append(place[value])
            others.append(rest / rest.sum())
    if not mine:
        return Reliability(name, len(said), None, None, None, middle, tuple(flags))
    own, rest_IV = np.array(mine), np.array(others)
    agrees = float(rest_IV[np.arange(len(own)), own].mean())
    chance = np.random.default_rng(0)
    dealt = np.array([rest_IV[np.arange(len(own)), chance.permutation(own)].mean() for _ in range(SHUFFLES)])
    likely = float((1 + (dealt >= agrees - 1e-12).sum()) / (1 + SHUFFLES))
    if len(own) >= FEWEST and likely > UNLIKELY:
        flags.append("agrees with the others no better than by chance")
    return Reliability(name, len(said), agrees, float(dealt.mean()), likely, middle, tuple(flags))
