"""Bradley and Terry's model (Biometrika 39, 1952): a strength for each of several systems, such that the logarithm of
the odds that one is preferred to another is the difference of their strengths. A tie is half a win for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PENALTY = 1e-4  # on squares: a system that always wins has a strength, large but finite
STEPS, NEAR = 200, 1e-10
RESAMPLES = 500


@dataclass(frozen=True)
class Strength:
    """`low`, `high`: of 95 %, by resampling the items. `expected`: share of wins against the other systems in the
    middle, if each met it equally often."""

    system: str
    value: float  # the mean of all systems is 0
    low: float
    high: float
    expected: float


def strengths(systems: Sequence[str], results: Sequence[tuple[str, str, float]]) -> list[Strength]:
    """results: (first, second, score of the first: 1, 0.5 or 0), one an item. Strongest first."""
    if not results:
        return []
    place = {name: number for number, name in enumerate(systems)}
    met = np.array([(place[a], place[b]) for a, b, _ in results])
    scores = np.array([score for *_, score in results])
    fitted = fit(_wins(met, scores, len(systems)))
    chance = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, len(systems)))
    for number in range(RESAMPLES):
        picked = chance.integers(0, len(scores), len(scores))
        drawn[number] = fit(_wins(met[picked], scores[picked], len(systems)))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    odds = 1 / (1 + np.exp(fitted[None, :] - fitted[:, None]))
    expected = (odds.sum(axis=1) - 0.5) / max(1, len(systems) - 1)
    found = [
        Strength(name, float(fitted[n]), float(low[n]), float(high[n]), float(expected[n])) for name, n in place.items()
    ]
    return sorted(found, key=lambda strength: -strength.value)


def fit(wins_SS: np.ndarray, penalty: float = PENALTY) -> np.ndarray:
    """The strengths [S] that make `wins_SS[i, j]`, how often i was preferred to j, likeliest, with a penalty on their
    squares; by Newton's method, which cannot miss: the function has one minimum and its curvature is known."""
    met_SS = wins_SS + wins_SS.T
    value_S = np.zeros(len(wins_SS))

    def loss(at_S: np.ndarray) -> float:
        gaps = at_S[:, None] - at_S[None, :]
        return float((wins_SS * np.logaddexp(0, -gaps)).sum() + penalty * (at_S**2).sum())

    now = loss(value_S)
    for _ in range(STEPS):
        chance_SS = 1 / (1 + np.exp(value_S[None, :] - value_S[:, None]))
        slope_S = (met_SS * chance_SS).sum(axis=1) - wins_SS.sum(axis=1) + 2 * penalty * value_S
        weight_SS = met_SS * chance_SS * (1 - chance_SS)
        curve_SS = np.diag(weight_SS.sum(axis=1) + 2 * penalty) - weight_SS
        step_S = np.linalg.solve(curve_SS, slope_S)
        size = 1.0
        while (there := loss(value_S - size * step_S)) > now and size > 1e-8:
            size /= 2
        value_S, now = value_S - size * step_S, there
        if np.abs(size * step_S).max() < NEAR:
            break
    return value_S - value_S.mean()


def _wins(met: np.ndarray, scores: np.ndarray, systems: int) -> np.ndarray:
    wins = np.zeros((systems, systems))
    np.add.at(wins, (met[:, 0], met[:, 1]), scores)
    np.add.at(wins, (met[:, 1], met[:, 0]), 1 - scores)
    return wins
