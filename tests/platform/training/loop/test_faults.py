"""Steps that are bad: skipped, or rolled back, the same by one worker and by two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

STEPS = 20


def test_steps_that_are_bad_are_skipped_and_training_goes_on(scenarios: Any) -> None:
    assert scenarios.incidents("skip") == [
        (7, "loss", None, None),
        (11, "gradient", None, None),
        (15, "spike", None, None),
    ]
    assert scenarios.runs["skip"][0].latest()["faults/skipped"] == 3
    losses = scenarios.history("skip", "loss")
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[STEPS] < losses[1] - 1
    straight = scenarios.report("straight")["tokens"]
    assert sum(scenarios.report("skip")["tokens"].values()) == sum(straight.values()) * (STEPS - 3) / STEPS


def test_a_roll_back_returns_to_the_last_checkpoint_and_goes_around_the_data(scenarios: Any) -> None:
    assert scenarios.incidents("back") == [(11, "spike", 8, 13)]
    found = scenarios.report("back")
    assert (found["step"], found["schedule_step"]) == (STEPS, STEPS)
    # Steps 9 and 10 were undone, 11 was bad, 12 and 13 lay around it.
    assert sum(found["tokens"].values()) == sum(scenarios.report("straight")["tokens"].values()) * (STEPS - 5) / STEPS
    assert scenarios.history("back", "loss")[STEPS] < scenarios.history("back", "loss")[1] - 1


@pytest.mark.parametrize("name", ["skip", "back"])
def test_two_workers_come_to_the_verdicts_and_the_weights_of_one(scenarios: Any, name: str) -> None:
    """Chaos is in the data of both, a loss that is no number as well."""
    assert scenarios.incidents(f"{name}, two workers") == scenarios.incidents(name)
    assert scenarios.report(f"{name}, two workers")["tokens"] == scenarios.report(name)["tokens"]
    expected = scenarios.weights(name)
    for weight, value in scenarios.weights(f"{name}, two workers").items():
        torch.testing.assert_close(value, expected[weight], rtol=0, atol=2e-3)


def test_a_run_that_is_killed_after_a_roll_back_comes_to_the_same_weights(scenarios: Any) -> None:
    first, second = scenarios.outcomes["back, killed"]
    assert first["error"] == "Died: before step 15"
    assert scenarios.incidents("back, killed") == scenarios.incidents("back")
    expected = scenarios.weights("back")
    assert all(torch.equal(weight, expected[name]) for name, weight in scenarios.weights("back, killed").items())
    assert second["report"]["tokens"] == scenarios.report("back")["tokens"]


def test_a_roll_back_before_the_first_checkpoint_returns_to_the_start(scenarios: Any) -> None:
    assert scenarios.incidents("back to the start") == [(2, "loss", 0, 2)]


@pytest.mark.parametrize(
    ("name", "steps", "rule"),
    [("too many", [5, 6, 7], "more than 2 bad steps in a row"), ("too often back", [3, 6], "more than 1 bad steps")],
)
def test_too_many_bad_steps_in_a_row_end_the_run_with_a_report(
    scenarios: Any, root: str, name: str, steps: list[int], rule: str
) -> None:
    error = scenarios.outcomes[name][0]["error"]
    assert error.startswith(f"TrainingFailed: training diverged before step {steps[-1]}: {rule}")
    assert all(f"step {step}: loss nan" in error for step in steps)
    assert f"{root}/stages/{name}/checkpoints" in error
    run = scenarios.runs[name][0]
    assert "faults/report.json" in [a.path for a in run.client.list_artifacts(run.id, "faults")]
