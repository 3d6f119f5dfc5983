"""A process a node that holds copies of its workers' state, and of another node's: an actor of Ray's, which lives
as long as the run's controller. The state of a worker that dies is here; that of a node that dies is at its peer's."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calumma.platform.training.standby.segment import Part, Segment

logger = logging.getLogger(__name__)
_PREFIX = "calumma-keeper"
_LOOK = 0.05  # seconds between two looks for steps to be copied to the peer


@dataclass(frozen=True)
class Holding:
    """A step of a part that a keeper holds."""

    keeper: str
    part: Part
    slot: int
    step: int
    record: dict[str, Any]
    path: str
    """By which processes of the keeper's own node map its memory."""


def keeper_name(run: str, node: str) -> str:
    """Of the keeper of a node, in a run."""
    return f"{_PREFIX}-{run}-{node}"


def keepers_of(run: str) -> list[str]:
    """Names of a run's keepers that live."""
    import ray.util

    return sorted(name for name in ray.util.list_named_actors() if name.startswith(f"{_PREFIX}-{run}-"))


def find_keeper(name: str) -> Any:
    """The handle of a keeper. Raises ValueError when it does not live."""
    import ray

    return ray.get_actor(name)


def keepers_here(run: str) -> list[Any]:
    """Handles of a run's keepers, that of this node first. Raises ValueError when this node has none."""
    import ray

    here = keeper_name(run, ray.get_runtime_context().get_node_id())
    return [find_keeper(here), *(find_keeper(name) for name in keepers_of(run) if name != here)]


def ask(keeper: Any, method: str, *given: Any) -> Any:
    """What a method of a keeper returns, be it an actor's handle or the object itself."""
    found = getattr(keeper, method)
    if not hasattr(found, "remote"):
        return found(*given)
    import ray

    return ray.get(found.remote(*given))


class Keeper:
    """Copies of the state of one node's workers, and of another's. Its methods may be called from several threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._segments: dict[tuple[str, int], Segment] = {}
        self._own: set[tuple[str, int]] = set()
        self._lock = threading.Lock()
        self._peer: Any = None
        self._sent: dict[tuple[str, int], int] = {}
        self._stop = threading.Event()
        threading.Thread(target=self._replicate, name="replicate", daemon=True).start()

    def ready(self) -> str:
        return self._name

    def follow(self, peer: Any) -> None:
        """From now on copy what this node's workers write to another keeper; None: there is no other node."""
        with self._lock:
            self._peer, self._sent = peer, {}

    def reserve(self, part: Part) -> str:
        """The path of memory for a worker's part: that of a like part of an earlier group, where there is one."""
        with self._lock:
            self._own.add(part.place)
            return self._segment(part).path

    def accept(self, part: Part, step: int, record: bytes, data: np.ndarray) -> None:
        """Hold a step of a worker of another node."""
        with self._lock:
            segment = self._segment(part)
        segment.forget_after(step - 1)
        slot = segment.begin()
        segment.data(slot)[:] = data
        segment.commit(slot, step, record)

    def holdings(self) -> list[Holding]:
        with self._lock:
            segments = list(self._segments.values())
        return [
            Holding(self._name, segment.part, filled.slot, filled.step, filled.record, segment.path)
            for segment in segments
            for filled in segment.filled()
        ]

    def read(
        self, place: tuple[str, int], slot: int, step: int, spans: Sequence[tuple[int, int]]
    ) -> list[np.ndarray] | None:
        """Bytes of a slot that has this step; None when it has no more."""
        with self._lock:
            segment = self._segments.get(place)
        return None if segment is None else segment.read(slot, step, spans)

    def keep_only(self, group: str) -> None:
        """Give the memory back of parts of other groups than the one that has taken over."""
        with self._lock:
            for place in [place for place in self._segments if place[0] != group]:
                self._segments.pop(place).close()
                self._own.discard(place)
                self._sent.pop(place, None)

    def forget(self) -> None:
        """All steps of all parts."""
        with self._lock:
            for segment in self._segments.values():
                segment.forget_after(-1)

    def close(self) -> None:
        self._stop.set()
        with self._lock:
            for segment in self._segments.values():
                segment.close()
            self._segments.clear()

    def _segment(self, part: Part) -> Segment:
        if part.place not in self._segments:
            self._segments[part.place] = Segment(part)
        return self._segments[part.place]

    def _replicate(self) -> None:
        while not self._stop.wait(_LOOK):
            with self._lock:
                peer = self._peer
                own = [(place, self._segments[place]) for place in self._own if place in self._segments]
            if peer is None:
                continue
            for place, segment in own:
                try:
                    self._send(peer, place, segment)
                except Exception as error:  # the peer is gone, or its memory is full: the storage is the second line
                    logger.warning("a step could not be copied to %s: %s", peer, error)
                    self._stop.wait(1.0)

    def _send(self, peer: Any, place: tuple[str, int], segment: Segment) -> None:
        filled = segment.filled()
        if not filled or self._sent.get(place) == filled[0].step:
            return
        newest, began = filled[0], time.monotonic()
        from pydantic_core import to_json

        found = segment.read(newest.slot, newest.step, [(0, segment.part.layout.data_bytes)])
        if found is None:  # overwritten meanwhile: the next
            return
        ask(peer, "accept", segment.part, newest.step, to_json(newest.record), found[0])
        self._sent[place] = newest.step
        logger.debug("step %d of %s copied in %.3f s", newest.step, place, time.monotonic() - began)
