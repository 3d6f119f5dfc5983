"""The rule that says when a loss has diverged, and which instrument rose before it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.training.trials.instruments import divergence, first_to_rise, rise, worth

RULE = (0.5, 4.0, 20)  # spike, alarm, alarm_after


def curve(loss: list[float], **instruments: list[float]) -> list[dict[str, float]]:
    """Points at steps 10, 20, …"""
    return [
        {"step": 10 * (at + 1), "loss": value, **{name: values[at] for name, values in instruments.items()}}
        for at, value in enumerate(loss)
    ]


@pytest.mark.parametrize(
    ("loss", "step"),
    [
        ([5.0, 4.0, 3.0, 3.4], None),
        ([5.0, 4.0, 3.0, 3.6], 40),
        ([5.0, 4.0, math.nan], 30),
        ([5.0, math.inf], 20),
        ([5.0, 4.0, 4.6, 3.0], 30),  # it came back, and was a spike all the same
        ([3.0, 3.3, 3.6], 30),  # slowly
        ([math.nan], 10),
    ],
)
def test_a_loss_diverges_at_a_spike_or_when_it_is_no_number(loss: list[float], step: int | None) -> None:
    assert divergence(curve(loss), 0.5) == step


@given(st.lists(st.floats(0, 20), min_size=1, max_size=30))
def test_a_loss_that_falls_never_diverges(losses: list[float]) -> None:
    assert divergence(curve(sorted(losses, reverse=True)), 0.5) is None


def test_an_instrument_rises_over_its_start() -> None:
    points = curve([1.0] * 6, log_z=[-1.0, 2.0, 7.9, -8.1, 0.0, 9.0], query_norm=[1.0, 1.0, 1.0, 2.0, 3.0, math.inf])
    assert rise(points, "log_z", 4.0, 20) == 40  # below zero as well
    assert rise(points, "log_z", 4.0, 30) is None
    assert rise(points, "query_norm", 4.0, 20) == 60


def test_warnings_leads_and_false_alarms_are_counted() -> None:
    falling = [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    broken = [5.0, 4.0, 3.0, 3.0, 3.0, 6.0]
    flat, early, late = [1.0] * 6, [1.0, 1.0, 9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0, 9.0, 9.0]
    with_it = [1.0, 1.0, 1.0, 1.0, 1.0, 9.0]
    trainings = [
        curve(broken, attention_logit_max=early, gradient_norm=late, log_z=with_it),
        curve(broken, attention_logit_max=late, gradient_norm=flat, log_z=flat),
        curve(falling, attention_logit_max=flat, gradient_norm=late, log_z=flat),
    ]
    found = worth(trainings, *RULE)
    assert list(found) == ["attention_logit_max", "gradient_norm", "log_z"]
    attention, gradient, log_z = found.values()
    assert (attention.warned, attention.diverged, attention.false, attention.sound) == (2, 2, 0, 1)
    assert (attention.leads, attention.lead) == ([10, 30], 20)
    assert (gradient.warned, gradient.false) == (1, 1)
    assert (log_z.warned, log_z.lead) == (0, None)  # what rises with the loss warns of nothing
    assert first_to_rise(trainings[0], *RULE) == ("attention_logit_max", 30)
    assert first_to_rise(trainings[2], *RULE) is None
