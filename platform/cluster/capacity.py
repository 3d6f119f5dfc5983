"""What a cluster, or this machine, offers, and how many workers of a job fit."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calumma.platform.specification import Resources, SpecificationError

_KIND = "accelerator_type:"  # with which Ray's resource of a kind of GPU begins


class ClusterError(RuntimeError):
    """A cluster that cannot be started or reached; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Capacity:
    """What jobs can have. `cpus` are Ray's logical CPUs; one of them stays free for reading data."""

    cpus: float
    gpus: float
    description: str
    accelerators: frozenset[str] | None = None
    """Kinds of GPUs, by Ray's names; none where they are not known."""


def cores() -> int:
    """CPU cores this process may use: its affinity, and its container's quota (cgroup v2) where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def logical_cpus(machine_cores: int) -> int:
    """CPUs an embedded cluster claims to have: a core each for workers and one to read data, so that two workers
    run on any machine. On fewer than four cores that is an oversubscription, slower but working."""
    return max(4, machine_cores + 1)


def gpus() -> int:
    """CUDA devices of this machine."""
    import torch

    return torch.cuda.device_count()


def cluster_capacity() -> Capacity:
    """What the running cluster offers (with what its autoscaler may add), or this machine when none runs yet."""
    if not ray_is_running():
        machine = cores()
        number = logical_cpus(machine)
        return Capacity(number, gpus(), f"this machine ({machine} cores, used as {number} logical CPUs)")
    import ray

    total = _with_autoscaler(ray.cluster_resources())
    kinds = frozenset(name.removeprefix(_KIND) for name in total if name.startswith(_KIND))
    return Capacity(total.get("CPU", 0.0), total.get("GPU", 0.0), "the cluster", kinds)


def require_workers(resources: Resources) -> int:
    """How many workers to start: all that were asked for or, of a range, as many as fit.

    Raises SpecificationError when the least that was asked for does not fit.
    """
    return workers_that_fit(resources, cluster_capacity())


def workers_that_fit(resources: Resources, capacity: Capacity) -> int:
    """`require_workers` against a known capacity."""
    wanted, kinds = resources.accelerator, capacity.accelerators
    if wanted is not None and resources.gpus_per_worker and kinds is not None and wanted not in kinds:
        others = ", ".join(sorted(kinds)) or "no GPUs"
        raise SpecificationError(f"resources.accelerator: {capacity.description} has no {wanted}, but {others}")
    workers = math.floor((capacity.cpus - 1) / resources.cpus_per_worker + 1e-9)
    if resources.gpus_per_worker:
        workers = min(workers, math.floor(capacity.gpus / resources.gpus_per_worker + 1e-9))
    if workers >= resources.min_workers:
        return min(workers, resources.max_workers)
    asked, most = resources.min_workers, max(workers, 0)
    each = f"{resources.cpus_per_worker:g} CPU"
    if resources.gpus_per_worker:
        each += f" and {resources.gpus_per_worker:g} GPU"
    advice = f"set resources.workers to at most {most}, " if most else "ask for less per worker, "
    raise SpecificationError(
        f"resources.workers: asked for {'at least ' if asked < resources.max_workers else ''}{asked} "
        f"with {each} each, and one CPU to read data; {capacity.description} has {capacity.cpus:g} CPUs and "
        f"{capacity.gpus:g} GPUs, enough for {most}: {advice}or use a larger cluster"
    )


def ray_is_running() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def _with_autoscaler(now: Mapping[str, float]) -> dict[str, float]:
    """Resources of the running nodes, raised to what the autoscaler's configuration allows where it is known."""
    import ray

    most: Mapping[str, Any] | None = None
    with contextlib.suppress(Exception):  # a Ray client, or a cluster without an autoscaler, knows no maximum
        most = ray._private.state.state.get_max_resources_from_cluster_config()
    return {key: max(now.get(key, 0.0), float((most or {}).get(key, 0.0))) for key in {*now, *(most or {})}}
