"""What MLflow is told of a stage: metrics, samples, checkpoints, and what it is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.entities import Run as Recorded
from mlflow.entities.logged_model_status import LoggedModelStatus

from calumma.platform.specification import Tracking
from calumma.platform.tracking import registry
from calumma.platform.training.checkpoints import catalog

STEPS = 20


def test_metrics_say_how_training_goes_and_where_its_time_goes(scenarios: Any) -> None:
    run = scenarios.runs["straight"][0]
    latest = run.latest()
    names = {"loss", "loss_text", "loss_image", "perplexity", "perplexity_image", "z", "z_loss", "learning_rate"}
    names |= {"gradient_norm", "tokens_per_second", "mfu", "peak_flops_per_second", "memory/host_gib", "workers"}
    names |= {"seconds/data", "seconds/compute", "seconds/checkpoint", "seconds/evaluation", "seconds_left"}
    names |= {"stability/layer_01/query_norm", "stability/log_z", "faults/skipped", "checkpoint_step", "step"}
    assert names <= set(latest)
    losses = scenarios.history("straight", "loss")
    assert list(losses) == [1, *range(2, STEPS + 1, 2)]
    assert losses[STEPS] < losses[1] - 1
    perplexities = scenarios.history("straight", "perplexity")
    assert perplexities == pytest.approx({step: math.exp(loss) for step, loss in losses.items()})
    assert latest["z_loss"] == pytest.approx(1e-5 * latest["z"])
    assert 0 < latest["mfu"] < 1
    assert latest["seconds/compute"] > 0
    assert 0.05 < latest["memory/host_gib"] < 64
    assert latest["seconds_left"] == 0


def test_held_out_losses_and_samples_come_on_the_way_and_at_the_end(scenarios: Any) -> None:
    found = scenarios.history("straight", "held_out/counting/loss")
    assert list(found) == [8, 16, STEPS]
    assert found[STEPS] < found[8]
    assert scenarios.report("straight")["held_out"]["counting"]["loss"] == pytest.approx(found[STEPS])
    run = scenarios.runs["straight"][0]
    pictures = [a.path for a in run.client.list_artifacts(run.id, "samples")]
    assert pictures == ["samples/00.png", "samples/step-00000010"]
    answers = [a.path for a in run.client.list_artifacts(run.id, "answers")]
    assert answers == ["answers/end.json", "answers/step-00000010.json"]


def test_the_watchdog_hears_of_steps_held_out_passes_and_samples(scenarios: Any) -> None:
    """Twenty steps; four passes over held-out rows at steps 8 and 16; before and after the samples of step 10."""
    (outcome,) = scenarios.outcomes["straight"]
    steps = [f"step {step:08d}" for step in range(1, STEPS + 1)]
    before = ["reading what it starts from", "building the engine", "reading weights", "starting"]
    assert outcome["places"] == [*before, *steps, "held-out measurement", "samples", "publishing"]
    assert outcome["beats"] >= len(outcome["places"]) + 2 * 4  # and at every held-out batch


def test_a_run_stands_below_its_project_and_says_what_it_is_made_of(scenarios: Any, root: str) -> None:
    runs = scenarios.runs
    recorded: list[Recorded] = [runs[name][0].client.get_run(runs[name][0].id) for name in ("straight", "skip")]
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in recorded}
    assert runs["skip"][0].client.get_run(parent).info.run_name == "chameleons"
    assert len(recorded[0].data.tags["mlflow.source.git.commit"]) == 40
    inputs = {entry.dataset.name: entry for entry in recorded[0].inputs.dataset_inputs}
    assert inputs.keys() == {"train", "text", "image"}
    assert json.loads(inputs["train"].dataset.source)["uri"] == f"{root}/tokens/train"
    assert {tag.value for tag in inputs["train"].tags} == {"training"}
    run = runs["straight"][0]
    assert [a.path for a in run.client.list_artifacts(run.id, "data")] == ["data/train.json"]
    environment = json.loads(Path(run.client.download_artifacts(run.id, "environment.json")).read_text())
    assert environment["packages"]["torch"] == torch.__version__


def test_checkpoints_are_logged_models_with_their_step_and_metrics(scenarios: Any, root: str) -> None:
    run = scenarios.runs["straight"][0]
    experiment = run.client.get_run(run.id).info.experiment_id
    found = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.id}'")
    by_name = {model.name: model for model in found}
    assert sorted(by_name) == [f"step-{step:08d}" for step in range(4, STEPS + 1, 4)]
    model = by_name["step-00000016"]
    assert model.status == LoggedModelStatus.READY
    assert model.tags["calumma.uri"] == catalog.checkpoint_uri(f"{root}/stages/straight", 16)
    metrics = {metric.key: (metric.value, metric.step) for metric in model.metrics}
    assert metrics["checkpoint/loss"] == (pytest.approx(scenarios.history("straight", "loss")[16]), 16)
    assert metrics["checkpoint/held_out_loss"][0] == pytest.approx(
        scenarios.history("straight", "held_out/counting/loss")[16]
    )
    outputs = run.client.get_run(run.id).outputs.model_outputs
    assert {output.step for output in outputs} == set(range(4, STEPS + 1, 4))


def test_a_registered_model_says_where_it_comes_from(scenarios: Any, root: str) -> None:
    scenarios.report("lora")
    run = scenarios.runs["lora"][0]
    uri = registry.register(Tracking(uri=f"{root}/mlflow"), "tuned", f"{root}/stages/lora/model", run.id)
    assert uri == "models:/tuned/1"
    tags = run.client.get_model_version("tuned", "1").tags
    assert tags["calumma.parent"] == "stages/straight"
    assert tags["calumma.step"] == str(STEPS)
    named = {value.rsplit(" ", 1)[0] for name, value in tags.items() if name.startswith("calumma.input.")}
    places = ("tokens/train", "tokenizers/text", "tokenizers/image", "stages/straight/model")
    assert named == {f"{root}/{place}" for place in places}
