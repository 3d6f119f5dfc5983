"""Notices an engine that has work and gets nothing done, and keeps what can be known of why."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import tempfile
import time

DUMP_SECONDS = 5.0  # most time for a process to write its stacks
LATE_SECONDS = 5.0  # without a finished step: what is submitted from now on is in none that has begun
MOST_OBSERVED = 5.0  # seconds between two looks that count: who watches may have been stopped, too


class StepCounter:
    """Steps that an engine's process has finished, in memory which it shares with its replica: to be read there
    whatever the process does, or did before its end."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)

    @staticmethod
    def new_descriptor() -> int:
        descriptor = os.memfd_create("calumma-steps")
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return descriptor

    @property
    def value(self) -> int:
        (count,) = struct.unpack_from("=q", self._memory)
        return int(count)

    def add(self) -> None:
        struct.pack_into("=q", self._memory, 0, self.value + 1)


class StallDetector:
    """Tells from what is seen from time to time whether an engine with work has finished no step for `limit` seconds;
    None: never. seconds: for so long now."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.seconds = 0.0
        self._steps = -1

    @property
    def late(self) -> bool:
        """Whether a step has been under way for a while."""
        return self.seconds >= LATE_SECONDS

    def look(self, steps: int, pending: bool, elapsed: float) -> bool:
        """Whether it has stalled. steps: finished so far. pending: there is work. elapsed: seconds since the last
        look."""
        if not pending or steps != self._steps:
            self._steps, self.seconds = steps, 0.0
        else:
            self.seconds += min(elapsed, MOST_OBSERVED)
        return self.limit is not None and self.seconds >= self.limit


class StackFile:
    """Where a process writes the Python stacks of its threads on SIGUSR1 (faulthandler, which needs neither the
    interpreter's lock nor a thread that listens)."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+b", prefix="calumma-stacks-")  # noqa: SIM115 as long as this object
        self.descriptor = self._file.fileno()

    def ask(self, pid: int) -> str:
        """The stacks of a process that has registered; "" where it does not write them in DUMP_SECONDS."""
        os.kill(pid, signal.SIGUSR1)
        end, size = time.monotonic() + DUMP_SECONDS, 0
        while time.monotonic() < end:
            time.sleep(0.2)
            before, size = size, os.fstat(self.descriptor).st_size
            if size and size == before:
                break
        self._file.seek(0)
        return self._file.read().decode(errors="replace")
