"""Whether what a pass wrote of a context is numbers: of a sequence that a token is drawn from, its logits tell; of one
that is only taken in, its last state, because that attends to all before it.

On a GPU that is copied to the host beside the work and looked at when the host has waited anyway, a pass later where
nothing is drawn.

Shape suffixes: B sequences, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from calumma.model.generation.cache.sequence import Sequence

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class Written(Generic[Owner]):
    """A sequence after a pass: its first `cached` tokens are written, in the `life` it had then."""

    owner: Owner
    sequence: Sequence
    cached: int
    life: int


@dataclass(frozen=True)
class Note(Generic[Owner]):
    """Which of some sequences are numbers; on the host when the event has come."""

    finite_B: Tensor
    event: torch.cuda.Event | None
    written: list[Written[Owner]]

    @classmethod
    def of(cls, finite_B: Tensor, written: list[Written[Owner]]) -> Note[Owner]:
        """finite_B: UInt8Tensor [B], 1 or 0."""
        if not finite_B.is_cuda:
            return cls(finite_B, None, written)
        host_B = torch.empty(finite_B.shape, dtype=finite_B.dtype, pin_memory=True)
        host_B.copy_(finite_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host_B, event, written)


class Verification(Generic[Owner]):
    """What has been found out and not been looked at yet."""

    def __init__(self) -> None:
        self._unread: list[Note[Owner]] = []

    def add(self, note: Note[Owner]) -> None:
        self._unread.append(note)

    def read(self, keep: int = 0) -> list[Owner]:
        """Mark sequences as verified; the owners of those that are no numbers. keep: the last so many notes wait for
        the next time."""
        broken: list[Owner] = []
        while len(self._unread) > keep:
            note = self._unread.pop(0)
            if note.event is not None:
                note.event.synchronize()
            for each, finite in zip(note.written, note.finite_B.tolist(), strict=True):
                if each.life != each.sequence.lives:  # its blocks were taken meanwhile
                    continue
                if finite:
                    each.sequence.verified = max(each.sequence.verified, each.cached)
                elif each.owner not in broken:
                    broken.append(each.owner)
        return broken
