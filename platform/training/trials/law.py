"""A scaling law: the loss of N parameters trained on D tokens, L = E + A / N^alpha + B / D^beta (Chinchilla, arXiv
2203.15556, its third approach), with what a resampling says about its certainty.

Minimized is the Huber loss of the difference of logarithms, so that one odd training does not decide. For given powers
the law is linear in E, A and B: starts are non-negative least squares over a grid of powers, of which scipy's bounded
`least_squares` descends from the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares, nnls

Values = NDArray[np.float64]
HUBER = 1e-3  # of the logarithm of the loss, from where on a difference counts by its size and not by its square
POWERS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0)
STARTS = 8
HIGHEST = 2.0  # power
_SMALLEST = 1e-12  # of a coefficient


@dataclass(frozen=True)
class Law:
    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Values:
        """Elementwise."""
        N, D = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        return np.asarray(self.E + self.A * N**-self.alpha + self.B * D**-self.beta)

    def best(self, compute: float, flops: Callable[[float], float]) -> tuple[float, float]:
        """(parameters, tokens) with the lowest loss at so much compute, where a token costs `flops(parameters)`; of
        sizes up to a factor of 1.01."""
        N = np.geomspace(1e4, 1e13, 2084)
        D = compute / np.array([flops(float(size)) for size in N])
        at = int(np.argmin(self.loss(N, D)))
        return float(N[at]), float(D[at])


def fit(
    parameters: ArrayLike, tokens: ArrayLike, losses: ArrayLike, start: Law | None = None, huber: float = HUBER
) -> Law:
    """The law of trainings. `start`: descend from there alone, as a resampling does. Raises ValueError for fewer than
    five trainings, which is how many numbers a law has."""
    N, D, L = (np.asarray(values, np.float64) for values in (parameters, tokens, losses))
    if len(L) < 5:
        raise ValueError(f"a scaling law has five numbers, and cannot be fitted to {len(L)} trainings")
    # Relative to the middle: the coefficients of far powers of large numbers would be of any size.
    n, d = (np.exp(np.log(values).mean()) for values in (N, D))
    x, y, logarithms = np.log(N / n), np.log(D / d), np.log(L)

    def residuals(theta: Values) -> Values:
        return np.asarray(np.log(_terms(theta).sum(0)) - logarithms)

    def _terms(theta: Values) -> Values:
        e, a, alpha, b, beta = theta
        return np.stack([np.full_like(x, math.exp(e)), np.exp(a - alpha * x), np.exp(b - beta * y)])

    def jacobian(theta: Values) -> Values:
        e, a, b = shares = _terms(theta)
        e, a, b = shares / (e + a + b)
        return np.stack([e, a, -a * x, b, -b * y], axis=1)

    def descend(theta: Values) -> tuple[float, Values]:
        low, high = [-30.0, -30.0, 0.0, -30.0, 0.0], [30.0, 30.0, HIGHEST, 30.0, HIGHEST]
        inside = np.clip(theta, np.array(low) + 1e-9, np.array(high) - 1e-9)
        settings = {"loss": "huber", "f_scale": huber, "bounds": (low, high), "x_scale": "jac"}
        found = least_squares(residuals, inside, jacobian, xtol=1e-12, ftol=1e-12, gtol=1e-12, **settings)
        return float(found.cost), found.x

    if start is None:
        starts = _starts(x, y, L)
    else:
        coefficients = (start.E, start.A * n**-start.alpha, start.B * d**-start.beta)
        e, a, b = (math.log(max(value, _SMALLEST)) for value in coefficients)
        starts = [np.array([e, a, start.alpha, b, start.beta])]
    _, (e, a, alpha, b, beta) = min((descend(theta) for theta in starts), key=lambda found: found[0])
    return Law(math.exp(e), math.exp(a) * n**alpha, alpha, math.exp(b) * d**beta, beta)


def _starts(x: Values, y: Values, losses: Values) -> list[Values]:
    """The best of a grid of powers, each with the E, A and B that suit it."""
    found = []
    for alpha in POWERS:
        for beta in POWERS:
            columns = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], axis=1)
            coefficients, off = nnls(columns, losses)
            e, a, b = np.log(np.maximum(coefficients, _SMALLEST))
            found.append((off, np.array([e, a, alpha, b, beta])))
    return [theta for _, theta in sorted(found, key=lambda one: one[0])[:STARTS]]


# -- certainty ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training of N parameters on D tokens, and how it does on each held-out document, the same for all."""

    size: int
    seed: int
    parameters: int
    tokens: int
    nll: Sequence[float]
    """Nats of each document."""
    counts: Sequence[int]
    """Trained tokens of each."""

    @property
    def loss(self) -> float:
        return sum(self.nll) / sum(self.counts)


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float

    @classmethod
    def over(cls, value: float, resampled: Sequence[float]) -> Interval:
        """Nine in ten of the resampled are within."""
        low, high = np.quantile(resampled, (0.05, 0.95))
        return cls(value, float(low), float(high))


@dataclass(frozen=True)
class Check:
    """What a law of smaller sizes says about a training, and what that came to."""

    predicted: Interval
    measured: Interval
    error: Interval
    """Measured minus predicted; both of the same resampled documents."""


@dataclass(frozen=True)
class Fitted:
    """A law and its resamplings."""

    law: Law
    resampled: list[Law]

    def number(self, name: str) -> Interval:
        return Interval.over(getattr(self.law, name), [getattr(law, name) for law in self.resampled])

    def loss(self, parameters: float, tokens: float) -> Interval:
        """What it predicts."""
        value, *others = (float(law.loss(parameters, tokens)) for law in (self.law, *self.resampled))
        return Interval.over(value, others)


def fit_trainings(trainings: Sequence[Training], resamples: Sequence[Resample]) -> Fitted:
    """The law of the trainings, means over seeds where there are several, and of each resample."""
    law = fit(*_table(trainings, None))
    return Fitted(law, [fit(*_table(trainings, one), start=law) for one in resamples])


def check(fitted: Fitted, of: Sequence[Training], resamples: Sequence[Resample]) -> Check:
    """`of`: trainings of one size and length that the law has not seen, a seed each."""
    N, D, (measured, *others) = _same(of, resamples)
    predicted = [float(law.loss(N, D)) for law in (fitted.law, *fitted.resampled)]
    off = [one - two for one, two in zip([measured, *others], predicted, strict=True)]
    return Check(
        Interval.over(predicted[0], predicted[1:]), Interval.over(measured, others), Interval.over(off[0], off[1:])
    )


@dataclass(frozen=True)
class Resample:
    """Documents and seeds drawn with replacement, the same for all trainings: how often each document counts, and for
    each size which of its seeds count."""

    documents: Values
    seeds: dict[int, list[int]]


def resample(trainings: Sequence[Training], number: int, seed: int) -> list[Resample]:
    random = np.random.default_rng(seed)
    documents = len(trainings[0].nll)
    seeds = {one.size: sorted({other.seed for other in trainings if other.size == one.size}) for one in trainings}
    return [
        Resample(
            np.bincount(random.integers(documents, size=documents), minlength=documents).astype(np.float64),
            {size: [int(one) for one in random.choice(known, len(known))] for size, known in seeds.items()},
        )
        for _ in range(number)
    ]


def _table(trainings: Sequence[Training], drawn: Resample | None) -> tuple[list[float], list[float], list[float]]:
    keys = sorted({(one.size, one.parameters, one.tokens) for one in trainings})
    grouped = [[one for one in trainings if (one.size, one.parameters, one.tokens) == key] for key in keys]
    return (
        [float(key[1]) for key in keys],
        [float(key[2]) for key in keys],
        [mean_loss(group, drawn) for group in grouped],
    )


def mean_loss(group: Sequence[Training], drawn: Resample | None = None) -> float:
    """Of trainings that differ by their seed alone: the mean of their losses, on what was drawn."""
    if drawn is None:
        return sum(one.loss for one in group) / len(group)
    by_seed = {one.seed: one for one in group}
    chosen = [by_seed[seed] for seed in drawn.seeds[group[0].size]]
    losses = [float(drawn.documents @ one.nll) / float(drawn.documents @ one.counts) for one in chosen]
    return sum(losses) / len(losses)


def _same(of: Sequence[Training], resamples: Sequence[Resample]) -> tuple[int, int, list[float]]:
    N, D = {(one.parameters, one.tokens) for one in of}.pop()
    return N, D, [mean_loss(of), *(mean_loss(of, drawn) for drawn in resamples)]
