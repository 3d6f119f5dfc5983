"""Learning rates: warm-up, decay, and their ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.training.sections import Schedule
from calumma.platform.training.steps.schedule import learning_rate

PEAK = 1e-3
kinds = st.sampled_from(["exponential", "cosine", "constant"])


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=10, final=0.1)
    rates = [learning_rate(step, PEAK, schedule, 100) for step in range(11)]
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert rates[10] == PEAK


@given(kinds, st.integers(0, 50), st.integers(1, 500), st.floats(0.001, 1))
def test_never_rises_after_the_warm_up_and_stays_between_its_ends(
    kind: str, warmup: int, total: int, final: float
) -> None:
    schedule = Schedule(kind=kind, warmup_steps=warmup, final=final)  # type: ignore[arg-type]
    rates = [learning_rate(step, PEAK, schedule, total) for step in range(warmup, warmup + total + 10)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert all(PEAK * final * (1 - 1e-9) <= rate <= PEAK for rate in rates)


@pytest.mark.parametrize("kind", ["exponential", "cosine"])
def test_arrives_at_the_final_share_and_stays(kind: str) -> None:
    schedule = Schedule(kind=kind, warmup_steps=5, final=0.01)  # type: ignore[arg-type]
    assert learning_rate(200, PEAK, schedule, 200) == pytest.approx(0.01 * PEAK)
    assert learning_rate(1000, PEAK, schedule, 200) == pytest.approx(0.01 * PEAK)


def test_exponential_falls_by_the_same_factor_every_step() -> None:
    schedule = Schedule(kind="exponential", warmup_steps=0, final=0.01)
    rates = [learning_rate(step, PEAK, schedule, 50) for step in range(50)]
    factors = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert factors == pytest.approx([0.01 ** (1 / 50)] * 49)


def test_two_stages_of_one_schedule_are_one_curve() -> None:
    schedule = Schedule(kind="exponential", warmup_steps=3, total_steps=30, final=0.1)
    straight = [learning_rate(step, PEAK, schedule, 30) for step in range(30)]
    first = [learning_rate(step, PEAK, schedule, 30) for step in range(20)]
    second = [learning_rate(20 + step, PEAK, schedule, 30) for step in range(10)]
    assert first + second == straight


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_rates_are_those_of_transformers(kind: str) -> None:
    """But for the first step: where ours takes the first part of the warm-up, transformers' takes a rate of 0."""
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    if kind == "constant":
        reference = transformers.get_constant_schedule_with_warmup(optimizer, num_warmup_steps=7)
    else:
        reference = transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, num_warmup_steps=7, num_training_steps=40, min_lr_rate=0.2
        )
    theirs = rates_of(reference, 40)
    schedule = Schedule(kind=kind, warmup_steps=7, final=0.2)  # type: ignore[arg-type]
    ours = [learning_rate(step, PEAK, schedule, 40) for step in range(40)]
    assert ours == pytest.approx(theirs[1:8] + theirs[7:], rel=1e-9)


def test_an_exponential_decay_is_that_of_pytorch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], PEAK)
    theirs = rates_of(torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.05 ** (1 / 30)), 30)
    schedule = Schedule(kind="exponential", warmup_steps=0, final=0.05)
    assert [learning_rate(step, PEAK, schedule, 30) for step in range(30)] == pytest.approx(theirs, rel=1e-9)


def rates_of(schedule: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates
