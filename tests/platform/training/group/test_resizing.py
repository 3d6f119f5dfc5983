"""A stage on clusters of its own whose nodes come and go: the same losses whatever happens."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from calumma.platform import storage
from calumma.platform.cluster import connection
from calumma.platform.cluster.progress import no_progress
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.errors import Stopped
from calumma.platform.training.group import notice
from calumma.platform.training.specification import (
    PretrainSpecification,
)
from calumma.platform.training.stage import run_stage

Stage = Callable[..., PretrainSpecification]
TrainingWorkers = Callable[[], list[psutil.Process]]
Losses = Callable[[Run], dict[int, float]]


@contextmanager
def machines(monkeypatch: pytest.MonkeyPatch, cpus: int, seconds: float) -> Iterator[Any]:
    """A cluster of this process whose nodes (raylets) come and go; a lost one is known to be so after `seconds`."""
    import ray
    from ray.cluster_utils import Cluster

    settings = {"RAY_health_check_period_ms": str(int(seconds * 1000 / 5)), "RAY_health_check_initial_delay_ms": "500"}
    for name, value in (connection.QUIET | connection.LEAN | settings).items():
        monkeypatch.setenv(name, value)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        yield nodes
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        nodes.shutdown()
        for left in psutil.wait_procs(started, timeout=10)[1]:  # Ray Train's data manager may not notice the end
            if left.name().startswith("ray::"):
                left.kill()


def groups_so_far(place: str) -> list[dict[str, Any]]:
    """The groups of workers that the newest checkpoint remembers, and how many steps it has."""
    found = catalog.newest(place)
    return [*found.manifest.report["groups"], {"step": found.step, "workers": 0}] if found else []


def endless(stage: Stage, output: str, **recovery: Any) -> PretrainSpecification:
    """A stage that takes steps until it is told to stop, and may change its size meanwhile."""
    return stage(
        output=output,
        micro_batches=6,
        checkpoint_every=10,
        log_every=1,
        samples=[],
        held_out={},
        optimizer={"learning_rate": 0.003},
        steps=100_000,
        schedule={"kind": "constant", "warmup_steps": 2, "total_steps": 100_000},
        resources={"cpus_per_worker": 1, **recovery},
    )


def until(trained: Future[Any], happened: Callable[[], bool]) -> None:
    """Wait for something that training brings about; what went wrong there is raised here."""
    while not happened() and not trained.done():
        time.sleep(0.02)
    if trained.done():
        trained.result()


def stopped(trained: Future[Any], place: str) -> int:
    """Have training stop; how many steps it has taken."""
    notice.notify(catalog.checkpoints_folder(place), "", "stop", "that is enough")
    with pytest.raises(Stopped, match="that is enough"):
        trained.result()
    return catalog.newest_step(place)


def undisturbed(stage: Stage, losses: Losses, steps: int) -> dict[int, float]:
    """The losses of so many steps on two workers to whom nothing happens."""
    # half a CPU: they and what reads data are two
    spec = endless(stage, f"stages/undisturbed-{steps}", workers=2, cpus_per_worker=0.5)
    spec = spec.model_copy(update={"steps": steps})
    with job_run(spec) as run:
        run_stage(spec, run, no_progress)
    return losses(run)


@pytest.mark.cluster
@pytest.mark.slow  # five groups of workers, one after the other, on a cluster of its own: two minutes
def test_a_stage_grows_and_shrinks_with_the_cluster(
    stage: Stage, losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node joins, and later leaves without grace: the same losses as on two workers all along, up to rounding."""
    spec = endless(stage, "stages/elastic", workers={"min": 1, "max": 3}, recovery={"resize_seconds": 2})
    place, pool = spec.locate(spec.output), ThreadPoolExecutor(1)

    def steps_of(number: int, workers: int) -> int:
        """How many steps the group of that number has taken."""
        found = groups_so_far(place)
        if len(found) < number + 1 or found[number - 1]["workers"] != workers:
            return 0
        return int(found[number]["step"] - found[number - 1]["step"])

    with machines(monkeypatch, cpus=2, seconds=2.5) as nodes:
        with job_run(spec) as run:
            trained = pool.submit(run_stage, spec, run, no_progress)
            until(trained, lambda: steps_of(1, workers=2) > 0)
            node = nodes.add_node(num_cpus=1)
            until(trained, lambda: steps_of(2, workers=3) >= 20)
            nodes.remove_node(node, allow_graceful=False)
            until(trained, lambda: steps_of(3, workers=2) >= 20)
            taken = stopped(trained, place)
        finishing = spec.model_copy(update={"steps": taken})
        with job_run(finishing) as finished_run:
            manifest = run_stage(finishing, finished_run, no_progress)
        expected = undisturbed(stage, losses, taken)
    assert [group["workers"] for group in manifest.report["groups"]] == [2, 3, 2]
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    assert "workers.png" in [artifact.path for artifact in run.client.list_artifacts(finished_run.id)]


@pytest.mark.cluster
@pytest.mark.slow  # seven groups of workers, one after the other, on a cluster of its own: minutes
def test_workers_and_nodes_lost_at_random_and_failing_storage_change_no_loss(
    stage: Stage, losses: Losses, training_workers: TrainingWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven blows in any order: a worker killed, a node gone (and another come), a checkpoint that cannot be written.
    Each step's loss is that of workers to whom nothing happened."""
    spec = endless(stage, "stages/blows", workers={"min": 1, "max": 2}, recovery={"resize_seconds": 1000})
    place, pool = spec.locate(spec.output), ThreadPoolExecutor(1)
    chance = random.Random(7)
    blows = ["worker"] * 3 + ["node"] * 2 + ["storage"] * 2
    chance.shuffle(blows)
    with machines(monkeypatch, cpus=1, seconds=7.5) as nodes:
        node = nodes.add_node(num_cpus=1)
        with job_run(spec) as run:
            trained = pool.submit(run_stage, spec, run, no_progress)
            for blow in [*blows, ""]:
                goal = catalog.newest_step(place) + 20  # the next may still be from before the last blow
                until(trained, lambda goal=goal: catalog.newest_step(place) >= goal)
                time.sleep(chance.random())
                if blow == "worker":
                    chance.choice(training_workers()).kill()
                elif blow == "node":
                    nodes.remove_node(node, allow_graceful=False)
                    node = nodes.add_node(num_cpus=1)
                elif blow == "storage":  # where one of the next checkpoints belongs there is something else
                    storage.write_bytes(catalog.checkpoint_uri(place, catalog.newest_step(place) + 30), b"")
            taken = stopped(trained, place)
            found = catalog.newest(place)
            assert found is not None
            found.manifest.verify(found.uri, content=True)
            groups = found.manifest.report["groups"]
        expected = undisturbed(stage, losses, taken)
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    assert len(groups) > blows.count("worker") + blows.count("node")
