"""Which steps are bad, by the losses of those before them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.training.sections import Faults
from calumma.platform.training.steps import faults
from calumma.platform.training.steps.faults import FaultHandler, Incident, LossGuard

finite = st.floats(0.1, 20)


def after(losses: list[float], rules: Faults) -> LossGuard:
    guard = LossGuard(rules)
    for loss in losses:
        guard.record_good(loss)
    return guard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_bad_from_the_first_step_on(loss: float) -> None:
    assert LossGuard(Faults()).judge(loss) == "loss"
    assert after([1.0] * 100, Faults(spike_factor=2.0)).judge(loss) == "loss"


@given(st.lists(finite, max_size=200), finite)
def test_without_a_factor_nothing_finite_is_bad(losses: list[float], loss: float) -> None:
    assert after(losses, Faults()).judge(loss) is None


@given(st.lists(finite, min_size=5, max_size=50), finite, st.floats(1.1, 4))
def test_a_spike_is_above_the_factor_times_the_median_of_the_window(
    losses: list[float], loss: float, factor: float
) -> None:
    guard = after(losses, Faults(spike_factor=factor, window=5))
    middle = sorted(losses[-5:])[2]
    assert guard.judge(loss) == ("spike" if loss > factor * middle else None)


def test_there_are_no_spikes_before_the_window_is_full() -> None:
    rules = Faults(spike_factor=2.0, window=5)
    assert after([1.0] * 4, rules).judge(100.0) is None
    assert after([1.0] * 5, rules).judge(100.0) == "spike"


def test_a_step_with_nothing_to_train_is_neither_bad_nor_remembered() -> None:
    guard = after([1.0] * 5, Faults(spike_factor=2.0, window=5))
    assert guard.judge(None) is None
    guard.record_good(None)
    assert list(guard.recent) == [1.0] * 5


def test_bad_steps_are_counted_in_a_row_until_a_good_one() -> None:
    guard = LossGuard(Faults(in_a_row=2))
    for _ in range(2):
        guard.record_bad()
    assert not guard.too_many
    guard.record_good(1.0)
    for _ in range(3):
        guard.record_bad()
    assert guard.too_many
    assert guard.metrics() == {"faults/skipped": 5.0, "faults/rolled_back": 0.0}


def test_roll_backs_are_counted_until_a_checkpoint_since_they_return_to_it() -> None:
    guard = LossGuard(Faults(action="roll_back", in_a_row=1))
    guard.record_bad()
    guard.record_good(1.0)
    guard.record_bad()
    assert guard.too_many
    guard.record_checkpoint()
    assert not guard.too_many


@given(st.lists(st.one_of(finite, st.just(math.nan)), max_size=60), st.lists(finite, max_size=20))
def test_one_that_was_kept_and_restored_judges_as_before(losses: list[float], more: list[float]) -> None:
    guard = LossGuard(Faults(spike_factor=1.5, window=4))

    def step(guard: LossGuard, loss: float) -> str | None:
        cause = guard.judge(loss)
        guard.record_good(loss) if cause is None else guard.record_bad()
        return cause

    for loss in losses:
        step(guard, loss)
    restored = LossGuard.from_state(guard.rules, json.loads(json.dumps(guard.state())))
    assert [step(guard, loss) for loss in more] == [step(restored, loss) for loss in more]
    assert restored.state() == guard.state()


@pytest.mark.parametrize("loss", [math.nan, math.inf, 3.5])
def test_incidents_survive_json_and_say_what_happened(loss: float) -> None:
    incident = Incident(7, "spike" if loss == 3.5 else "loss", loss, 1.5, "roll_back", back_to=4, resumed_after=9)
    again = Incident.from_json(json.loads(json.dumps(incident.to_json(), allow_nan=False)))
    assert again.describe() == incident.describe()
    assert "back to step 4, on after 9" in incident.describe()


def test_the_report_names_the_steps_the_rule_and_what_to_do() -> None:
    incidents = [Incident(step, "gradient", 2.0, None, "skip") for step in (5, 6, 7, 8)]
    told = faults.divergence_report(8, incidents, Faults(in_a_row=2), 0.01, "/stage/checkpoints")
    assert "more than 2 bad steps in a row (faults.in_a_row)" in told
    assert [f"step {step}:" in told for step in (5, 6, 7, 8)] == [False, True, True, True]
    assert "optimizer.learning_rate (now 0.01)" in told
    assert "/stage/checkpoints" in told


def test_steps_that_are_passed_over_count_across_checkpoints() -> None:
    guard = LossGuard(Faults(in_a_row=1))
    guard.record_bad()
    guard.record_checkpoint()
    assert not guard.too_many
    guard.record_bad()
    assert guard.too_many


def test_data_that_a_roll_back_leaves_out_stay_out_when_the_run_is_resumed() -> None:
    incident = Incident(7, "loss", math.nan, None, "roll_back", back_to=4, resumed_after=9)
    assert FaultHandler(Faults(), {"incidents": [incident.to_json()]}, 100).resume_after == 9
    assert FaultHandler(Faults(), {}, 100).resume_after == 0
