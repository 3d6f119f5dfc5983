"""How a worker's process comes to be one of another group: what it leaves behind, and what a spare imports ahead. This
module imports nothing heavy."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import pickle
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)
_ROOM = 2  # times what a process takes: with as much free, what it had before stays a little longer


class GroupLost(RuntimeError):
    """Another worker of the group is lost: what this one computes is of no use."""


class Interruptible:
    """Work of one thread that another may end, by an exception at its next line of Python: a step in the middle of its
    backward pass would else notice only at its next collective, most of a step later."""

    def __init__(self) -> None:
        self._lock, self._thread, self._ended = threading.Lock(), 0, False
        threading.current_thread().interruptible = self  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        with self._lock:
            self._thread = threading.get_ident()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._lock:
            self._thread = 0
        if self._ended and kind is None:  # where it came in something that swallows exceptions
            raise GroupLost("another worker of the group is lost")

    def end(self) -> None:
        """Called by another thread. Outside of the work, and a second time, nothing is done."""
        with self._lock:
            if self._thread and not self._ended:
                self._ended = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(GroupLost))


def leave_group(error: BaseException) -> None:
    """What training had is let go, and with it the connections to the other workers, so that they notice at once, and
    this process can be one of another group. NCCL may wait for ever for one that is lost: there nothing is done."""
    import psutil
    import torch.distributed as dist

    traceback.clear_frames(error.__traceback__)
    if psutil.virtual_memory().available < _ROOM * psutil.Process().memory_info().rss:
        gc.collect()  # some tenths of a second; else it comes when the next group has taken its first step
    if not dist.is_initialized() or dist.get_backend() == "gloo":
        release_group()


def leave_finished() -> bool:
    """The same where training has ended well; whether its process can be one of the next training's."""
    import torch.distributed as dist

    gc.collect()
    release_group()
    return not dist.is_initialized()


def release_group() -> None:
    """Leave the group of torch.distributed, and let DeepSpeed forget those that it remembers of its own."""
    import torch.distributed as dist

    deepspeed: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed is not None:
        sys.modules["deepspeed.utils.groups"]._release_process_group_references()
        deepspeed.cdb = None
    with suppress(RuntimeError, ValueError, AssertionError):  # Ray Train's controller may do it at the same time
        if dist.is_initialized():
            dist.destroy_process_group()


def left_group(seconds: float) -> bool:
    """Whether this worker's training has ended within that time: then its process can be one of another group."""
    from ray.train.v2._internal.execution.context import get_train_context

    training, end = get_train_context().execution_context.training_thread_runner, time.monotonic() + seconds
    work = getattr(training._thread, "interruptible", None)
    if work is not None:
        work.end()
    while training.is_running() and time.monotonic() < end:
        time.sleep(0.005)
    return not training.is_running()


def preload(packed: bytes) -> None:
    """Everything that a loop on a CPU imports; `packed`: the loop, and what it rehearses, if anything."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import mlflow  # noqa: F401
    import ray.data
    import ray.train.torch  # noqa: F401

    _, rehearse = pickle.loads(packed)
    if rehearse is not None:
        try:
            rehearse()
        except Exception:  # whatever it is, a real start meets it too, and tells it better
            logger.warning("a spare process could not rehearse, and will start slower", exc_info=True)
