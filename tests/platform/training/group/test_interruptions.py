"""A stage on a cluster whose workers are killed, or told to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from calumma.platform.cluster.progress import no_progress
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.specification import (
    PretrainSpecification,
)
from calumma.platform.training.stage import run_stage
from calumma.platform.training.standby import recall

Stage = Callable[..., PretrainSpecification]
When = Callable[[Callable[[], bool], Callable[[], object]], threading.Thread]
TrainingWorkers = Callable[[], list[psutil.Process]]
Losses = Callable[[Run], dict[int, float]]


@pytest.mark.cluster
def test_a_killed_worker_changes_nothing(
    ray_cluster: None, stage: Stage, when: When, training_workers: TrainingWorkers, losses: Losses
) -> None:
    """kill -9 after the first checkpoint: the group is started again, and every loss is that of the run that lost
    nobody. The groups that the last checkpoint remembers say which step was taken by which: each exactly once."""
    found: list[dict[int, float]] = []
    plain = {"steps": 80, "checkpoint_every": 20, "log_every": 1, "samples": [], "held_out": {}}
    for output, kill in (("stages/straight", False), ("stages/killed", True)):
        spec = stage(output=output, **plain)
        place = spec.locate(output)
        if kill:
            when(lambda place=place: catalog.newest_step(place) >= 20, lambda: training_workers()[-1].kill())
        with job_run(spec) as run:
            manifest = run_stage(spec, run, no_progress)
        found.append(losses(run))
    straight, killed = found
    groups = manifest.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2]
    assert groups[0]["step"] == 0
    assert 20 <= groups[1]["step"] < 80
    assert sorted(killed) == sorted(straight) == list(range(1, 81))
    assert killed == pytest.approx(straight, rel=1e-6)


@pytest.mark.cluster
def test_a_killed_worker_is_back_from_memory_without_a_lost_step(
    ray_cluster: None, stage: Stage, when: When, training_workers: TrainingWorkers, losses: Losses
) -> None:
    """kill -9 where storage has no checkpoint at all: the group goes on from the copies in memory, from the newest step
    that was held when the worker died or a later one, and every loss is that of the run that lost nobody."""
    plain = {"steps": 100, "checkpoint_every": 100, "log_every": 1, "samples": [], "held_out": {}}
    held: list[int] = []
    found: list[dict[int, float]] = []
    for output, recovery in (("stages/plain", {}), ("stages/held", {"copy_every": 1, "spares": True})):
        resources = {"workers": 2, "cpus_per_worker": 1, "recovery": recovery}
        spec = stage(output=output, **plain, resources=resources)
        with job_run(spec) as run:

            def kill(run: Run = run) -> None:
                held.append(recall.newest_step(run.id))
                training_workers()[0].kill()

            if recovery:
                when(lambda run=run: recall.newest_step(run.id) >= 10, kill)
            manifest = run_stage(spec, run, no_progress)
        found.append(losses(run))
    straight, killed = found
    groups = manifest.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2]
    assert 10 <= held[0] <= groups[1]["step"] < 100
    assert killed == pytest.approx(straight, rel=1e-6)


@pytest.mark.cluster
def test_sigterm_ends_a_stage_with_a_checkpoint_and_the_same_command_goes_on(
    ray_cluster: None, caplog: pytest.LogCaptureFixture, stage: Stage, when: When
) -> None:
    fields: dict[str, Any] = {"steps": 200, "micro_batches": 12, "checkpoint_every": 20, "log_every": 50}
    spec = stage(output="stages/stopped", **fields, samples=[], held_out={})
    place = spec.locate("stages/stopped")
    when(lambda: catalog.newest_step(place) >= 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with job_run(spec) as run, pytest.raises(SystemExit) as ended:
        run_stage(spec, run, no_progress)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = catalog.newest_step(place)
    assert 20 < stopped < 200
    assert f"stopped after step {stopped} (SIGTERM)" in caplog.text
    assert "the same command goes on" in caplog.text
    with job_run(spec) as run:
        manifest = run_stage(spec, run, no_progress)
    assert [group["step"] for group in manifest.report["groups"]] == [0, stopped]
