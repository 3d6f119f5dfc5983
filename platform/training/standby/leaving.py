"""How a worker's process comes to be one of another group: what it leaves behind, and what a spare imports ahead. This
module imports nothing heavy."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
from contextlib import suppress
from typing import Any


def leave_group(error: BaseException) -> None:
    """What training had is let go, and with it the connections to the other workers, so that they notice at once, and
    this process can be one of another group. NCCL may wait for ever for one that is lost: there nothing is done."""
    import torch.distributed as dist

    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if dist.is_initialized() and dist.get_backend() != "gloo":
        return
    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None:  # it remembers groups of its own
        sys.modules["deepspeed.utils.groups"]._release_process_group_references()
        deepspeed.cdb = None
    with suppress(RuntimeError, ValueError, AssertionError):  # Ray Train's controller may do it at the same time
        if dist.is_initialized():
            dist.destroy_process_group()


def left_group(seconds: float) -> bool:
    """Whether this worker's training has ended within that time: then its process can be one of another group."""
    from ray.train.v2._internal.execution.context import get_train_context

    training, end = get_train_context().execution_context.training_thread_runner, time.monotonic() + seconds
    while training.is_running() and time.monotonic() < end:
        time.sleep(0.02)
    return not training.is_running()


def preload(packed_loop: bytes) -> None:
    """Everything that a loop on a CPU imports."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import mlflow  # noqa: F401
    import ray.data
    import ray.train.torch  # noqa: F401

    pickle.loads(packed_loop)
