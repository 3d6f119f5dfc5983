"""A stage on a cluster whose workers are killed, or told to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from calumma.model import load
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
def test_workers_killed_and_told_to_end_change_nothing(
    ray_cluster: None,
    caplog: pytest.LogCaptureFixture,
    stage: Stage,
    when: When,
    training_workers: TrainingWorkers,
    losses: Losses,
) -> None:
    """kill -9 after the first checkpoint, SIGTERM later on, and the same command again; beside it kill -9 where storage
    has no checkpoint at all, and the group goes on from the copies in memory. Every loss is that of the run to which
    nothing happened, and the groups that the last checkpoint remembers say that each step was taken once."""
    fields = {
        "log_every": 1,
        "samples": [],
        "held_out": {},
        "checkpoint_every": 10,
        "optimizer": {"learning_rate": 0.003},
    }
    fields["schedule"] = {"kind": "constant", "warmup_steps": 2, "total_steps": 100_000}
    spec = stage(output="stages/blows", steps=100_000, **fields)
    place = spec.locate("stages/blows")
    struck: list[int] = []

    def kill() -> None:
        struck.append(catalog.newest_step(place))
        training_workers()[-1].kill()
        when(lambda: catalog.newest_step(place) >= struck[0] + 20, lambda: os.kill(os.getpid(), signal.SIGTERM))

    when(lambda: catalog.newest_step(place) >= 10, kill)
    before = signal.getsignal(signal.SIGTERM)
    with job_run(spec) as run, pytest.raises(SystemExit) as ended:
        run_stage(spec, run, no_progress)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = catalog.newest_step(place)
    assert f"stopped after step {stopped} (SIGTERM)" in caplog.text
    assert "the same command goes on" in caplog.text
    steps = stopped + 40
    spec = spec.model_copy(update={"steps": steps})
    with job_run(spec) as again:
        finished = run_stage(spec, again, no_progress)
    groups = finished.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2, 2]
    assert groups[0]["step"] == 0
    assert struck[0] <= groups[1]["step"] < groups[2]["step"] == stopped
    blows = losses(run) | losses(again)

    held: list[int] = []
    fields["checkpoint_every"] = steps
    resources = {"workers": 2, "cpus_per_worker": 1, "recovery": {"copy_every": 1, "spares": True}}
    spec = stage(output="stages/held", steps=steps, **fields, resources=resources)
    with job_run(spec) as run:

        def kill_early() -> None:
            held.append(recall.newest_step(run.id))
            training_workers()[0].kill()

        when(lambda: recall.newest_step(run.id) >= 10, kill_early)
        manifest = run_stage(spec, run, no_progress)
    groups = manifest.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2]
    assert 10 <= held[0] <= groups[1]["step"] < steps
    copied = losses(run)

    spec = stage(output="stages/straight", steps=steps, **fields)
    with job_run(spec) as run:
        undisturbed = run_stage(spec, run, no_progress)
    straight = losses(run)
    assert sorted(blows) == sorted(straight) == list(range(1, steps + 1))
    assert blows == pytest.approx(straight, rel=1e-6)
    assert copied == pytest.approx(straight, rel=1e-6)
    assert finished.report["tokens"] == undisturbed.report["tokens"]
    weights = load(Path(place, "model")).transformer.state_dict()
    for name, weight in load(Path(spec.locate("stages/straight"), "model")).transformer.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
