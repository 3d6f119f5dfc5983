"""Trainings that follow each other on one machine have the same processes, as long as nothing goes wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from calumma.platform.cluster.progress import no_progress
from calumma.platform.specification import Resources
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import connect
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.group.fit import fit
from calumma.platform.training.standby.handed_on import handing_on

pytestmark = pytest.mark.cluster
Train = Callable[..., list[int]]


@pytest.fixture
def train(ray_cluster: None, tmp_path: Path) -> Train:
    """train(workers, fails=False): processes of a training, by rank, which sum something meanwhile."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run(uri, connect(uri).create_run("0").info.run_id)

    def loop(config: dict[str, Any]) -> list[int]:
        import deepspeed
        import torch
        import torch.distributed as dist

        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
        found = torch.tensor([0] * dist.get_world_size())
        found[dist.get_rank()] = os.getpid()
        deepspeed.comm.all_reduce(found)
        if config["fails"]:
            raise ValueError("as it was told")
        return found.tolist()

    def train(workers: int, fails: bool = False) -> list[int]:
        found: list[int] = fit(
            loop,
            {"fails": fails},
            workers=workers,
            resources=Resources(workers=workers, cpus_per_worker=0.5),
            name="handed on",
            run=run,
            steps=1,
            progress=no_progress,
            stacks=str(tmp_path / "stacks"),
        )
        return found

    return train


def wait_for_end(numbers: list[int]) -> None:
    processes = []
    for number in numbers:
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(number))
    assert not psutil.wait_procs(processes, timeout=120)[1], "they live on"


def test_processes_are_handed_on_until_a_training_fails(train: Train) -> None:
    with handing_on():
        first = train(2)
        assert len(set(first)) == 2
        assert train(1)[0] in first, "a smaller group has some of them, and the others wait"
        with pytest.raises(TrainingFailed, match="as it was told"):
            train(2, fails=True)
        wait_for_end(first)  # nobody knows what a failure leaves behind
        later = train(2)
        psutil.Process(later[0]).kill()
        last = train(2)
        assert later[0] not in last
        assert later[1] in last
    wait_for_end(last)
