"""Shared memory for the copies of what one worker owns of the training state: two slots, written in turn.

The memory is a file without a name (memfd_create): it is in no folder of a limited size, outlives the worker that
writes to it, and is free as soon as its keeper has ended, in whatever way that was.

Invariants. A slot's step is written last and taken away first, so that a slot that has a step is whole. A writer never
touches the slot that has the newest step, so that a worker killed while it writes leaves the step before.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calumma.platform.training.checkpoints.layout import PartLayout, States

SLOTS = 2
_HEAD = 16  # bytes: the step + 1, 0 for none; the length of the record
_RECORD = 1 << 20  # bytes that a record may take
_ALIGN = 4096  # slots and data begin at pages


class RecordTooLong(ValueError):
    """What is told of a step takes more room than a slot has."""


@dataclass(frozen=True)
class Part:
    """What a worker of a group owns: the same for all its steps."""

    group: str
    """What its group is told from others by: groups that cut the state in the same way have the same."""
    rank: int
    world: int
    layout: PartLayout
    states: States
    names: tuple[str, ...]
    """Of all parameters, the same on every worker."""

    @property
    def place(self) -> tuple[str, int]:
        """What it is kept by."""
        return self.group, self.rank

    @property
    def slot_bytes(self) -> int:
        return _HEAD + _RECORD + -(_HEAD + _RECORD) % _ALIGN + self.layout.data_bytes + -self.layout.data_bytes % _ALIGN


@dataclass(frozen=True)
class Filled:
    """A slot that has a step."""

    slot: int
    step: int
    record: dict[str, Any]


class Segment:
    """The slots of one part, in memory that another process may map by `path`."""

    def __init__(self, part: Part, path: str | None = None) -> None:
        """Without a path the memory is made here, and given back when this process ends or `close` is called."""
        self.part = part
        size = SLOTS * part.slot_bytes
        if path is None:
            self._file = os.memfd_create("calumma-state", os.MFD_CLOEXEC)
            os.ftruncate(self._file, size)
        else:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._file, size)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._data = part.slot_bytes - (part.layout.data_bytes + -part.layout.data_bytes % _ALIGN)

    @property
    def path(self) -> str:
        """By which processes of this machine and user map the same memory, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def filled(self) -> list[Filled]:
        """The slots that have a step, newest first."""
        found = []
        for slot in range(SLOTS):
            step, length = self._head(slot).tolist()
            if step:
                begin = slot * self.part.slot_bytes + _HEAD
                record = json.loads(self._bytes[begin : begin + length].tobytes())
                found.append(Filled(slot, step - 1, record))
        return sorted(found, key=lambda filled: -filled.step)

    def step(self, slot: int) -> int:
        """Of a slot; -1 when it has none."""
        return int(self._head(slot)[0]) - 1

    def begin(self) -> int:
        """The slot that is to be written next: not the one that has the newest step."""
        slot = min(range(SLOTS), key=self.step)
        self._head(slot)[0] = 0
        return slot

    def forget_after(self, step: int) -> None:
        """Take away what comes after a step: a group goes on from there."""
        for slot in range(SLOTS):
            if self.step(slot) > step:
                self._head(slot)[0] = 0

    def commit(self, slot: int, step: int, record: bytes) -> None:
        """What was written to a slot is the state after `step` steps. Raises RecordTooLong."""
        if len(record) > _RECORD:
            raise RecordTooLong(f"what is told of step {step} takes {len(record):,} bytes, {_RECORD:,} are the most")
        begin = slot * self.part.slot_bytes + _HEAD
        self._bytes[begin : begin + len(record)] = np.frombuffer(record, np.uint8)
        head = self._head(slot)
        head[1] = len(record)
        head[0] = step + 1

    def data(self, slot: int) -> np.ndarray:
        """uint8 [data_bytes] of a slot, to be read and written."""
        begin = slot * self.part.slot_bytes + self._data
        return self._bytes[begin : begin + self.part.layout.data_bytes]

    def tensors(self, slot: int) -> list[Tensor]:
        """A slot's ranges as flat tensors, in the order of the layout: all of the first state, then of the next."""
        found, begin, data = [], 0, torch.from_numpy(self.data(slot))
        for dtype in self.part.states.values():
            for numel in self.part.layout.numels.tolist():
                end = begin + numel * dtype.itemsize
                found.append(data[begin:end].view(dtype))
                begin = end
        return found

    def read(self, slot: int, step: int, spans: Sequence[tuple[int, int]]) -> list[np.ndarray] | None:
        """Copies of spans (begin, end) of a slot's data; None when it has another step meanwhile."""
        data = self.data(slot)
        found = [data[begin:end].copy() for begin, end in spans]
        return found if self.step(slot) == step else None

    def close(self) -> None:
        """Give the memory back, unless something still has views of it."""
        os.close(self._file)
        del self._bytes
        try:
            self._map.close()
        except BufferError:  # freed with the last view
            del self._map

    def _head(self, slot: int) -> np.ndarray:
        begin = slot * self.part.slot_bytes
        return self._bytes[begin : begin + _HEAD].view(np.int64)
