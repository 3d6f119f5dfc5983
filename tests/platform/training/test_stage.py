"""A whole stage: refused without a trace, or trained on a cluster, published, resumed and continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calumma.model import load
from calumma.model.config import ModelConfig
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking import registry
from calumma.platform.tracking.fingerprints import unchanged_result
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training.specification import (
    FinetuneSpecification,
    PretrainSpecification,
)
from calumma.platform.training.stage import run_stage

Stage = Callable[..., PretrainSpecification]
SHORT = ModelConfig(layers=1, width=32, heads=4, kv_heads=4, ffn_width=64, context=32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": SHORT}, "the model's context is 32"),
        ({"mixture": {"tokens/pairs": 0.0}}, "a mixture weight must be above 0"),
        ({"initial": "initial", "continue_schedule": True}, "continue_schedule: .* has no checkpoint"),
    ],
)
def test_a_stage_that_is_refused_leaves_the_output_as_it_was(
    root: str, run: Run, tmp_path: Path, change: dict[str, Any], said: str, stage: Stage
) -> None:
    storage.write_bytes(f"{root}/initial/config.json", SHORT.model_dump_json().encode())
    spec = stage(output=str(tmp_path / "stage"), resources={"workers": 1}).model_copy(update=change)
    storage.write_bytes(f"{spec.output}/checkpoints/step-00000004/state/part", b"killed before its manifest")
    Manifest(kind="stage").write(spec.output)
    before = storage.sizes(spec.output)
    with pytest.raises(SpecificationError, match=said):
        run_stage(spec, run, no_progress)
    assert storage.sizes(spec.output) == before


# -- on a cluster --


@pytest.mark.cluster
def test_a_stage_trains_publishes_and_is_continued(
    ray_cluster: None, root: str, caplog: pytest.LogCaptureFixture, stage: Stage
) -> None:
    spec = stage(register_as="tiny", alias="champion")
    progress: list[tuple[float, float]] = []
    with job_run(spec) as run:
        manifest = run_stage(spec, run, lambda done, total, note="": progress.append((done, total)))

    # Losses fall, and everything is in MLflow.
    losses = [m.value for m in run.client.get_metric_history(run.id, "loss")]
    steps = [m.step for m in run.client.get_metric_history(run.id, "loss")]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    assert losses[-1] < losses[0] - 0.5
    names = {"loss", "loss_text", "loss_image", "learning_rate", "gradient_norm", "tokens_per_second", "z"}
    latest = run.latest()
    assert names | {"held_out/lines/loss", "stability/layer_01/query_norm", "stability/log_z"} <= set(latest)
    assert all(np.isfinite(value) for value in latest.values())
    assert latest["tokens_per_second"] > 0
    artifacts = [a.path for folder in ("samples", "checkpoints") for a in run.client.list_artifacts(run.id, folder)]
    assert artifacts == ["samples/00.png", "checkpoints/step-00000008.json", "checkpoints/step-00000012.json"]
    assert progress[0] == (0, 12)

    # The manifest, the model directory and the registry agree.
    assert unchanged_result(f"{root}/stages/one", spec) == manifest
    manifest.verify(f"{root}/stages/one", content=True)
    report = manifest.report
    assert (report["steps"], report["workers"], report["model_uri"]) == (12, 2, "models:/tiny@champion")
    assert report["held_out"]["lines"]["loss"] == pytest.approx(latest["held_out/lines/loss"])
    assert report["tokens"]["text"] > 0
    assert report["tokens"]["image"] > 0
    with registry.resolve_model(report["model_uri"], spec.tracking) as path:
        assert path.parent == Path(root, "stages/one/registered")  # where no later training writes
        answer = load(path).transformer(torch.tensor([[0, 5, 6]]))
    assert answer.shape[:2] == (1, 3)

    # The next stage goes on with optimizer and schedule, on another number of workers, too.
    second = FinetuneSpecification.model_validate(
        stage().model_dump(exclude={"job", "model"})
        | {"initial": "stages/one", "continue_schedule": True, "output": "stages/two", "steps": 1, "dropout": 0.0}
        | {"resources": {"workers": 1}, "schedule": {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}}
    )
    with job_run(second) as run:
        manifest = run_stage(second, run, no_progress)
    assert "fresh optimizer" not in caplog.text
    assert manifest.report["schedule_step"] == 13
    assert run.latest()["loss"] < losses[0] - 0.5  # it did not start from scratch
    assert load(Path(root, "stages/two/model")).config.dropout == 0.0
