"""Which checkpoint a stage goes on from, and whose it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calumma.platform import storage
from calumma.platform.cluster import runner
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.preparation import prepare
from calumma.platform.training.specification import (
    PretrainSpecification,
    TrainSpecification,
)

Stage = Callable[..., PretrainSpecification]


def leave_checkpoint(spec: TrainSpecification, step: int, inputs: dict[str, str]) -> None:
    report = {"step": step, "schedule_step": step, "tokens": {"text": 0.0, "image": 0.0}}
    Manifest(kind="checkpoint", specification=spec.model_dump(mode="json"), report=report, inputs=inputs).write(
        catalog.checkpoint_uri(spec.locate(spec.output), step)
    )


def test_a_stage_goes_on_from_its_newest_whole_checkpoint(run: Run, tmp_path: Path, stage: Stage) -> None:
    spec = stage(output=str(tmp_path / "stage"))
    inputs = prepare(spec, run).inputs
    for step in (2, 4):
        leave_checkpoint(spec, step, inputs)
    storage.write_bytes(f"{catalog.checkpoint_uri(spec.output, 6)}/state/part", b"killed before its manifest")
    again = spec.model_copy(update={"log_every": 1, "samples": []})
    assert prepare(again, run).first_step == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 1}, r"other settings \(seed\)"),
        ({"micro_batches": 4, "z_loss": 0.0}, r"other settings \(micro_batches, z_loss\)"),
        ({"steps": 13}, r"`steps` was 12 and is 13, and without schedule\.total_steps .*another training"),
        ({"mixture": {"tokens/pairs": 1.0}}, r"other settings \(mixture\)"),
    ],
)
def test_the_checkpoints_of_another_training_are_refused_and_kept(
    run: Run, tmp_path: Path, change: dict[str, Any], why: str, stage: Stage
) -> None:
    spec = stage(output=str(tmp_path / "stage"))
    leave_checkpoint(spec, 4, prepare(spec, run).inputs)
    other = spec.model_copy(update=change)
    with pytest.raises(SpecificationError, match=rf"stage/checkpoints .* step 4.*{why}.* `output`.* --force"):
        prepare(other, run)
    found = catalog.newest(spec.output)
    assert found is not None
    assert found.step == 4
    runner.delete_result(other)  # what --force does
    assert prepare(other, run).first_step == 0


def test_the_checkpoints_of_a_longer_training_are_refused_and_kept(run: Run, tmp_path: Path, stage: Stage) -> None:
    schedule = {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}
    spec = stage(output=str(tmp_path / "stage"), schedule=schedule)
    leave_checkpoint(spec, 12, prepare(spec, run).inputs)
    with pytest.raises(SpecificationError, match="it is to end after step 8"):
        prepare(spec.model_copy(update={"steps": 8}), run)


def test_other_data_under_the_same_name_is_another_training(root: str, run: Run, tmp_path: Path, stage: Stage) -> None:
    spec = stage(output=str(tmp_path / "stage"))
    inputs = prepare(spec, run).inputs
    leave_checkpoint(spec, 4, inputs | {f"{root}/tokens/pairs": "another fingerprint"})
    with pytest.raises(SpecificationError, match=r"other data or tokenizers \([^,]*tokens/pairs\)"):
        prepare(spec, run)


def test_a_stage_can_be_lengthened_when_its_schedule_is_longer_than_it(run: Run, tmp_path: Path, stage: Stage) -> None:
    schedule = {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}
    spec = stage(output=str(tmp_path / "stage"), schedule=schedule)
    leave_checkpoint(spec, 12, prepare(spec, run).inputs)
    assert prepare(spec.model_copy(update={"steps": 20}), run).first_step == 12
