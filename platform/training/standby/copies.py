"""The worker's side: after a step, what it owns of the training state goes to its node's keeper."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic_core import to_json

from calumma.platform.training.checkpoints import layout
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.checkpoints.saver import COUNTERS
from calumma.platform.training.standby.keeper import ask
from calumma.platform.training.standby.segment import Part, RecordTooLong, Segment

logger = logging.getLogger(__name__)


class Copies:
    """Copies of this worker's part in its node's memory, every so many steps; training waits for the copy alone."""

    def __init__(self, keepers: Callable[[], Sequence[Any]], every: int, first: int) -> None:
        """`keepers()`: the one of this node, and then all others; the steps are those after the `first`."""
        self._keepers, self._every, self._first = keepers, every, first
        self._segment: Segment | None = None
        self._incarnation = ""
        self._written = 0
        self.seconds = 0.0
        """How long training has waited."""

    def after_step(self, engine: Any, done: int, report: dict[str, Any]) -> None:
        """`done` steps were taken. Every worker calls it after every step."""
        if done % self._every:
            return
        began = time.monotonic()
        owned = OwnedState(engine)
        segment = self._reserved(owned, engine.zero_optimization_stage())
        slot = segment.begin()
        targets = iter(segment.tensors(slot))
        (fragments,) = owned.opened()  # one list: a state that is on a disk is not copied
        for state in segment.part.states:
            for fragment in fragments:
                next(targets).copy_(fragment.states[state], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        counters = {"step": owned.step} | {name: int(getattr(engine, name)) for name in COUNTERS}
        told = {"report": report | {"counters": counters}, "incarnation": self._incarnation}
        try:
            segment.commit(slot, done, to_json(told))
        except RecordTooLong as error:
            logger.warning("no copy in memory: %s", error)
        self._written += 1
        if self._written == 3 and segment.part.rank == 0:  # of all workers: each writes one after a collective
            for keeper in self._keepers():
                ask(keeper, "keep_only", segment.part.group)
        self.seconds += time.monotonic() - began

    def _reserved(self, owned: OwnedState, zero_stage: int) -> Segment:
        """The memory for what is owned now: before its first step an optimizer has no moments."""
        states, ranges, names = owned.states, owned.ranges, owned.parameters
        if self._segment is not None and self._segment.part.states == states:
            return self._segment
        if not self._incarnation:
            mark = [uuid.uuid4().hex]
            if dist.get_world_size() > 1:
                dist.broadcast_object_list(mark, src=0)
            self._incarnation = mark[0]
        _, part = layout.part_layout(ranges, states, names)
        world, kinds = dist.get_world_size(), ",".join(f"{state}:{dtype}" for state, dtype in states.items())
        whole = Part(
            f"{world}/{zero_stage}/{kinds}", dist.get_rank(), world, part._replace(begin=0), states, tuple(names)
        )
        self._segment = Segment(whole, ask(self._keepers()[0], "reserve", whole))
        self._segment.forget_after(self._first)
        return self._segment
