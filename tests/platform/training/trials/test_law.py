"""The scaling law's fit, against published numbers and other optimizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from calumma.platform.training.trials import law
from calumma.platform.training.trials.law import Law, Training

# "Chinchilla Scaling: A replication attempt" (arXiv 2404.10102), abstract and table 1.
PUBLISHED = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


def grid(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and losses of trainings as Chinchilla's: nine budgets of compute, five sizes each."""
    random = np.random.default_rng(seed)
    budgets = np.geomspace(6e18, 3e21, 9)
    N = np.concatenate([math.sqrt(budget / 120) * np.geomspace(0.25, 4, 5) for budget in budgets])
    D = np.repeat(budgets, 5) / (6 * N)
    return N, D, PUBLISHED.loss(N, D) * np.exp(noise * random.standard_normal(len(N)))


def test_the_published_law_is_found_again() -> None:
    found = law.fit(*grid(noise=0.0))
    for name, value in vars(PUBLISHED).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name


def test_without_hubers_bound_it_is_the_least_squares_of_another_optimizer() -> None:
    """Levenberg and Marquardt's of MINPACK, with derivatives by differences."""
    N, D, L = grid(noise=0.003)

    def logarithm(x: np.ndarray, e: float, a: float, alpha: float, b: float, beta: float) -> np.ndarray:
        return np.log(np.exp(e) + np.exp(a - alpha * np.log(x[0])) + np.exp(b - beta * np.log(x[1])))

    start = (0.5, 6.0, 0.35, 7.5, 0.36)
    (e, a, alpha, b, beta), _ = curve_fit(logarithm, np.stack([N, D]), np.log(L), p0=start, maxfev=20_000)
    found = law.fit(N, D, L, huber=10.0)
    assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-3)
    assert found.loss(7e10, 1.4e12) == pytest.approx(
        math.exp(e) + math.exp(a) / 7e10**alpha + math.exp(b) / 1.4e12**beta
    )
    assert found.loss(7e10, 1.4e12) != pytest.approx(float(PUBLISHED.loss(7e10, 1.4e12)), rel=1e-4)


def test_one_odd_training_does_not_decide() -> None:
    N, D, L = grid(noise=0.0)
    L[7] *= 1.2
    assert float(law.fit(N, D, L).loss(7e10, 1.4e12)) == pytest.approx(float(PUBLISHED.loss(7e10, 1.4e12)), rel=2e-3)
    assert float(law.fit(N, D, L, huber=10.0).loss(7e10, 1.4e12)) != pytest.approx(
        float(PUBLISHED.loss(7e10, 1.4e12)), rel=2e-3
    )


def test_fewer_trainings_than_a_law_has_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="five numbers"):
        law.fit([1e6] * 4, [1e6, 2e6, 3e6, 4e6], [4, 3, 2, 1])


def test_the_best_size_for_a_compute_is_the_papers_formula() -> None:
    """Equation 4 of arXiv 2203.15556, for 6 FLOPs a parameter and token."""
    _, A, alpha, B, beta = vars(PUBLISHED).values()
    compute = 5.76e23
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    N, D = PUBLISHED.best(compute, lambda parameters: 6 * parameters)
    assert N == pytest.approx(G * (compute / 6) ** (beta / (alpha + beta)), rel=0.01)
    assert D == pytest.approx(compute / 6 / N)


def trainings(noise: float, documents: int = 40, seed: int = 0) -> list[Training]:
    """Four sizes at three lengths of a known law; the documents differ, each a little otherwise in every training."""
    random, truth = np.random.default_rng(seed), Law(E=1.0, A=40.0, alpha=0.3, B=200.0, beta=0.35)
    hardness = np.exp(0.3 * random.standard_normal(documents))
    hardness *= documents / hardness.sum()
    found = []
    for size, parameters in enumerate((1_000_000, 3_000_000, 10_000_000, 30_000_000)):
        for tokens in (250_000, 500_000, 1_000_000):
            each = 100 * hardness * float(truth.loss(parameters, tokens))
            each *= np.exp(noise * random.standard_normal(documents))
            found.append(Training(size, 0, parameters, tokens, each.tolist(), [100] * documents))
    return found


def test_a_prediction_is_checked_on_documents_that_both_see() -> None:
    every = trainings(noise=0.01)
    resamples = law.resample(every, 60, seed=1)
    fitted = law.fit_trainings([one for one in every if one.size < 3], resamples)
    found = law.check(fitted, [every[-1]], resamples)
    assert found.measured.value == pytest.approx(every[-1].loss)
    assert found.error.value == pytest.approx(found.measured.value - found.predicted.value)
    # What documents are drawn moves both alike: their difference is far more certain than either.
    widths = {name: interval.high - interval.low for name, interval in vars(found).items()}
    assert widths["error"] < 0.5 * min(widths["predicted"], widths["measured"])
    assert found.error.low < 0 < found.error.high


def test_noise_widens_the_intervals() -> None:
    def width(noise: float) -> float:
        every = trainings(noise)
        interval = law.fit_trainings(every, law.resample(every, 60, seed=1)).number("alpha")
        assert interval.low <= interval.high
        return interval.high - interval.low

    assert width(0.03) > 2 * width(0.003)


def test_resampling_draws_seeds_as_well() -> None:
    every = [Training(0, seed, 1_000_000, 1_000, [seed + 1.0] * 8, [1] * 8) for seed in range(4)]
    losses = {law.mean_loss(every, one) for one in law.resample(every, 50, seed=0)}
    assert min(losses) >= 1
    assert max(losses) <= 4
    assert len(losses) > 5
    assert law.mean_loss(every) == 2.5
