"""Ablations: curves of the norms that each stabilizer bounds, over seeds."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calumma.model.config import ModelConfig
from calumma.platform.cluster import runner
from calumma.platform.training.trials import ablation, ablation_figure
from calumma.platform.training.trials.running import Notebook
from calumma.platform.training.trials.specification import AblateSpecification


def ablation_of(root: str, shape: ModelConfig, **fields: Any) -> AblateSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "mixture": {"tokens/pairs": 0.5, "tokens/lines": 0.5},
        "model": shape.model_copy(update={"dropout": 0.0}).model_dump(exclude={"vocabulary_size"}),
        "variants": {"all": {}, "no query-key norm": {"query_key_norm": False}, "no z-loss": {"z_loss": 0}},
        "learning_rates": [0.01],
        "z_loss": 0.1,
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "steps": 30,
        "micro_batches": 2,
    }
    return AblateSpecification.model_validate(values | fields)


def test_an_ablation_shows_what_each_stabilizer_bounds(root: str, shape: ModelConfig) -> None:
    spec = ablation_of(root, shape)
    curves = {(name, 0.01): [list(ablation.train_variant(spec, name, 0.01, 0))] for name in spec.variants}
    found = ablation.summary(spec, curves)
    start = {name: curves[name, 0.01][0][0] for name in spec.variants}
    assert found["all, 0.01: loss"] < start["all"]["loss"] - 0.5
    growth = {name: found[f"{name}, 0.01: query_norm"] / start[name]["query_norm"] for name in spec.variants}
    assert growth["no query-key norm"] > 2 * growth["all"]
    assert abs(found["all, 0.01: log_z"]) < abs(found["no z-loss, 0.01: log_z"])
    assert found["all, 0.01: diverged"] == 0
    drawn = ablation_figure.figure(spec, curves)
    assert {line.get_label() for line in drawn.axes[0].get_lines()} == set(spec.variants)


def test_dropout_is_the_same_again_after_a_stop(root: str, shape: ModelConfig, tmp_path: Path) -> None:
    spec = ablation_of(root, shape, variants={"dropout": {"dropout": 0.2}}, steps=12)
    whole = list(ablation.train_variant(spec, "dropout", 0.01, 1))
    notebook = Notebook(str(tmp_path / "state.pt"))
    stopped = ablation.train_variant(spec, "dropout", 0.01, 1, notebook)
    assert list(islice(stopped, 2)) == whole[:2]
    notebook.stopping = True
    with pytest.raises(RuntimeError, match="stopped"):
        list(stopped)
    assert list(ablation.train_variant(spec, "dropout", 0.01, 1, Notebook(notebook.place))) == whole
    assert list(ablation.train_variant(spec, "dropout", 0.01, 2)) != whole


def test_a_training_that_breaks_ends_and_is_told(root: str, shape: ModelConfig, tmp_path: Path) -> None:
    """A rate of 10^30 leaves float32; the others go on, and the job publishes."""
    fields: dict[str, Any] = {"variants": {"all": {}}, "learning_rates": [0.01, 1e30], "seeds": 2, "steps": 6}
    fields |= {"output": "ablations/broken", "resources": {"workers": 0}, "log_every": 2, "alarm_after": 1}
    spec = ablation_of(root, shape, tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"}, **fields)
    manifest, _ = runner.run_job(spec, ablation.run)
    assert manifest.report["all, 0.01: diverged"] == 0
    assert manifest.report["all, 1e+30: diverged"] == 2
    output = Path(spec.output_uri)
    curves = json.loads((output / "curves.json").read_text())
    assert [(one["learning_rate"], one["seed"]) for one in curves] == [(0.01, 0), (0.01, 1), (1e30, 0), (1e30, 1)]
    assert curves[0]["curve"] != curves[1]["curve"]
    assert not math.isfinite(curves[-1]["curve"][-1]["loss"])
    told = json.loads((output / "instruments.json").read_text())
    assert [one["diverged"] is not None for one in told["trainings"]] == [False, False, True, True]
    assert {found["diverged"] for found in told["instruments"].values()} == {2}
    assert (output / "ablation.png").stat().st_size > 10_000


def test_bands_are_over_seeds_and_leave_out_what_is_no_number() -> None:
    seeds = [
        [{"step": 1, "loss": 2.0, "query_norm": 1.0}, {"step": 2, "loss": 4.0, "query_norm": 100.0}],
        [{"step": 1, "loss": 4.0, "query_norm": 4.0}, {"step": 2, "loss": math.nan, "query_norm": math.inf}],
    ]
    assert ablation_figure.across(seeds, "loss", False) == [(1, 3.0, 2.0, 4.0), (2, 4.0, 4.0, 4.0)]
    (_, mean, low, high), last = ablation_figure.across(seeds, "query_norm", True)
    assert (mean, low, high) == (pytest.approx(2.0), 1.0, 4.0)
    assert last == (2, pytest.approx(100.0), 100.0, 100.0)


def test_a_variant_of_an_unknown_field_is_refused_by_its_name(root: str, shape: ModelConfig) -> None:
    with pytest.raises(ValidationError, match=r"variants\.odd: .*\n?.*qk_norm"):
        ablation_of(root, shape, variants={"odd": {"qk_norm": False}})
