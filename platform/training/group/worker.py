"""What a worker of a group knows about itself: rank, world size, device, its share of the machine's cores."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


THREADS_VARIABLE = (
    "CALUMMA_THREADS"  # environment: threads of a worker on a CPU; default: its share of the node's cores
)


@dataclass(frozen=True)
class Worker:
    """What a worker knows about itself."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def set_up_worker() -> Worker:
    """To be called first in a worker's loop: settles libraries, threads and device."""
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    # DeepSpeed and MLflow tell on every worker what nobody asked for; warnings stay.
    for name in ("DeepSpeed", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for one, and may find a driver without a device
        threads = int(os.environ.get(THREADS_VARIABLE, 0))
        torch.set_num_threads(threads or max(1, _cores() // context.get_local_world_size()))
    return Worker(context.get_world_rank(), context.get_world_size(), device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
