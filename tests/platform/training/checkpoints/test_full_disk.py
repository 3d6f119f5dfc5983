"""Disks that fill up while a training runs: a real file system of a few megabytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training import preparation
from calumma.platform.training.checkpoints import catalog, room
from calumma.platform.training.checkpoints.node_local import NodeLocal
from calumma.platform.training.checkpoints.saver import Saver
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.group import supervisor
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import PretrainSpecification
from tests.platform.training.checkpoints.test_saver import Engine, report, specification

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Eight megabytes, of which other files may take some."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class State:
    """Two megabytes, whole on every worker."""

    device = torch.device("cpu")

    def zero_optimization_stage(self) -> int:
        return 0

    def whole_state(self) -> dict[str, Any]:
        return {"weights": torch.zeros(MEGABYTE // 2)}


def training(output: Path, when_full: str) -> supervisor.Supervisor:
    fields = {"storage": "/nowhere", "mixture": {"tokens": 1.0}, "initial": "x", "steps": 100, "micro_batches": 4}
    resources = {"keep": {"last": 9, "when_full": when_full}}
    spec = PretrainSpecification.model_validate(fields | {"output": str(output), "resources": resources})
    given: Any = SimpleNamespace(
        spec=spec, inputs={}, output=str(output), first_step=0, resume=None, run=SimpleNamespace(fence=None)
    )
    return supervisor.Supervisor(State(), given, Worker(0, 1, torch.device("cpu")))


def save(stage: supervisor.Supervisor, first: int, last: int) -> None:
    for step in range(first, last + 1):
        stage.check_step(step - 1)
        stage.after_step(step, {"step": step, "schedule_step": step, "tokens": {}}, due=True)


def whole(output: Path) -> list[int]:
    steps = catalog.published_steps(str(output))
    for step in steps:
        uri = catalog.checkpoint_uri(str(output), step)
        Manifest.read(uri).verify(uri, content=True)
    return sorted(steps)


def test_a_full_disk_leaves_whole_checkpoints_and_no_remains_and_then_ends_the_run(
    group_of_one: None, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> None:
        with training(disk, "fail") as stage:
            save(stage, 1, 9)

    with pytest.raises(TrainingFailed, match=r"3 checkpoints in a row .* no room for 0\.002\d* GB at .*GB are free"):
        run()
    assert whole(disk) == [1, 2, 3]
    assert not [file for file in disk.rglob("*") if file.is_file() and "step-00000004" in str(file)]
    assert "training goes on with the one before it" in caplog.text


def test_a_disk_that_another_fills_while_a_checkpoint_is_written_costs_that_one_alone(
    group_of_one: None, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when it began. What was written of it makes room again for the next."""
    filler = disk / "filler"
    with training(disk, "fail") as stage:
        save(stage, 1, 1)
        stage.wait_until_published()
        with monkeypatch.context() as patch:
            patch.setattr(room, "lacking", lambda uri, needed: "")
            filler.write_bytes(bytes(room.free_bytes(str(disk)) or 0)[:-MEGABYTE])
            save(stage, 2, 2)
            with pytest.raises(TrainingFailed, match=r"step-00000002 was not written: .*No space left"):
                stage.wait_until_published()
        assert not [file for file in disk.rglob("*") if file.is_file() and "step-00000002" in str(file)]
        assert MEGABYTE * 0.9 < (room.free_bytes(str(disk)) or 0)
        filler.unlink()
        save(stage, 3, 3)
    assert whole(disk) == [1, 3]


def test_older_checkpoints_make_room_where_that_is_asked_for(group_of_one: None, disk: Path) -> None:
    with training(disk, "prune") as stage:
        save(stage, 1, 9)
    steps = whole(disk)
    assert steps[-1] == 9
    assert 2 <= len(steps) <= 3


def test_a_hosts_own_disk_without_room_takes_no_copy_until_it_has_some(
    group_of_one: None, s3: str, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two megabytes a checkpoint: first the older copy makes room, then there is none to be made; each checkpoint is in
    storage all the same, and once others have left the disk it takes copies again."""
    output, run, filler = f"{s3}/stage", Engine(MEGABYTE // 2), disk / "filler"
    here = {"resources": {"recovery": {"node_local": str(disk / "here")}}}
    spec = PretrainSpecification.model_validate(specification(output).model_dump() | here)

    def copied(step: int) -> list[str]:
        uri = catalog.checkpoint_uri(output, step)
        with Saver(spec, {}) as saver:
            saver.save(run, uri, report(step))  # type: ignore[arg-type]
            saver.wait_until_published()
        Manifest.read(uri).verify(uri, content=True)
        return sorted({path.parent.name.split("-")[1].lstrip("0") for path in disk.rglob("part-*.safetensors")})

    assert [copied(step) for step in (1, 2, 3)] == [["1"], ["1", "2"], ["2", "3"]]
    filler.write_bytes(bytes(3 * MEGABYTE))
    assert copied(4) == ["3", "4"]
    assert "is kept on this host" not in caplog.text
    shutil.rmtree(next(disk.rglob("step-00000003-*")))
    filler.write_bytes(bytes(5 * MEGABYTE))
    assert copied(5) == ["4"]
    assert "no copy of the checkpoint" in caplog.text
    assert "there is no room for 0.0021 GB" in caplog.text
    filler.unlink()
    assert copied(6) == ["4", "6"]


def test_the_workers_of_a_host_ask_for_room_for_all_of_them(disk: Path) -> None:
    uri = "s3://bucket/stage/checkpoints/step-00000001/x/part-00000.safetensors"
    assert NodeLocal(disk / "here", workers=3).make_room(uri, 2 * MEGABYTE) == ""
    assert "no room for" in NodeLocal(disk / "here", workers=5).make_room(uri, 2 * MEGABYTE)


def test_a_stage_whose_first_checkpoint_has_no_room_is_refused(disk: Path) -> None:
    assignment: Any = SimpleNamespace(
        output=str(disk / "stages/one"), resume=None, spec=SimpleNamespace(trainable_names=["all"])
    )
    preparation._check_room(assignment, 400_000)
    with pytest.raises(SpecificationError, match=r"output: there is no room for 0\.016 GB at .*stages/one"):
        preparation._check_room(assignment, 1_000_000)
    assignment.output = "s3://bucket/stage"
    preparation._check_room(assignment, 10**12)
    assert storage.is_remote(assignment.output)
