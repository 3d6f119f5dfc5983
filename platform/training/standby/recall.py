"""Going on from the copies in memory: the newest step of which every part is held somewhere, read by ranges."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.checkpoints import catalog, layout
from calumma.platform.training.checkpoints.agreement import gather_messages
from calumma.platform.training.checkpoints.fragments import Fragment, OwnedState
from calumma.platform.training.checkpoints.layout import Index
from calumma.platform.training.checkpoints.saver import COUNTERS
from calumma.platform.training.standby.keeper import Holding, ask, find_keeper, keepers_of
from calumma.platform.training.standby.segment import Segment

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)
Find = Callable[[str], Any]  # a keeper by its name


class CopyLost(RuntimeError):
    """A copy in memory that was there is no more; the group starts over, from what is left."""


@dataclass(frozen=True)
class Held(Checkpoint):
    """A step that is held in memory, as a checkpoint."""

    holdings: tuple[Holding, ...] = ()
    """Of every part one, by rank."""


def newest(holdings: Iterable[Holding]) -> Held | None:
    """The newest step of which all parts are held, written by one group of workers."""
    sets: dict[tuple[int, str, str], dict[int, Holding]] = defaultdict(dict)
    for holding in holdings:
        sets[holding.step, holding.record["incarnation"], holding.part.group].setdefault(holding.part.rank, holding)
    whole = [
        (step, found) for (step, _, _), found in sets.items() if len(found) == next(iter(found.values())).part.world
    ]
    if not whole:
        return None
    step, found = max(whole, key=lambda item: item[0])
    report = found[0].record["report"]
    manifest = Manifest(kind=catalog.KIND, files=[], report=report)
    return Held(f"memory:step-{step:08d}", manifest, tuple(found[rank] for rank in sorted(found)))


def newest_step(run: str) -> int:
    """Steps of the newest copy of a run's state in memory; -1 when there is none."""
    held = newest(held_by(keepers_of(run), find_keeper))
    return held.step if held is not None else -1


def agreed(run: str, beyond: int) -> Held | None:
    """The newest copy of a run's state in memory, where it is further than `beyond` steps: the same on all workers,
    each of which calls it."""
    choice: list[Held | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        choice[0] = newest(held_by(keepers_of(run), find_keeper))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(choice, src=0)
    held = choice[0]
    return held if held is not None and held.step > beyond else None


def give_up(run: str) -> None:
    """Let keepers forget what they hold: the next group goes on from storage. Every worker calls it."""
    if dist.get_rank() == 0:
        for name in keepers_of(run):
            ask(find_keeper(name), "forget")


def held_by(names: Iterable[str], find: Find) -> list[Holding]:
    """What these keepers hold; one that has died holds nothing."""
    found: list[Holding] = []
    for name in names:
        try:
            found += ask(find(name), "holdings")
        except Exception as error:  # ray's, of many kinds
            logger.warning("%s does not answer: %s", name, error)
    return found


def load(engine: DeepSpeedEngine, held: Held, here: str, find: Find) -> None:
    """Weights, optimizer and counters of a step into an engine, whatever number of workers and ZeRO stage wrote it.
    Every worker calls it; `here` is the name of its node's keeper, whose memory it reads without a copy.

    Raises CopyLost on all of them when one cannot read what it needs.
    """
    owned, counters, problem = OwnedState(engine), held.manifest.report["counters"], ""
    parts = [holding.part for holding in held.holdings]
    states = list(parts[0].states)
    index = Index(layout.index_bytes([part.layout for part in parts], parts[0].states, parts[0].names))
    try:
        for fragments in owned.filling(states, counters["step"]):
            _fill(fragments, states, index, dict(enumerate(held.holdings)), here, find)
    except Exception as error:  # of Ray's, of the operating system's
        problem = f"{type(error).__name__}: {error}"
    if problems := [message for message in gather_messages(problem) if message]:
        raise CopyLost(f"the copy of step {held.step} in memory cannot be read: {problems[0]}")
    owned.settle()
    for name in COUNTERS:
        setattr(engine, name, counters[name])


def _fill(
    fragments: list[Fragment], states: list[str], index: Index, holdings: Mapping[int, Holding], here: str, find: Find
) -> None:
    wanted: dict[int, list[tuple[int, int, torch.Tensor, torch.dtype]]] = defaultdict(list)
    ranks = {layout.part_name(rank): rank for rank in holdings}
    for fragment in fragments:
        for state in states:
            size = index.states[state].itemsize
            places = index.places(fragment.parameter, state, fragment.offset, fragment.numel)
            for name, position, first, numel in places:
                target = fragment.states[state].narrow(0, first, numel)
                wanted[ranks[name]].append((position, position + numel * size, target, index.states[state]))
    for rank, spans in wanted.items():
        holding = holdings[rank]
        cuts = [(begin, end) for begin, end, _, _ in spans]
        if holding.keeper == here:
            segment = Segment(holding.part, holding.path)
            data = segment.data(holding.slot)
            found: list[np.ndarray] | None = [data[begin:end] for begin, end in cuts]
        else:
            found = ask(find(holding.keeper), "read", holding.part.place, holding.slot, holding.step, cuts)
        if found is None:
            raise CopyLost(f"{holding.keeper} has step {holding.step} of worker {rank} no more")
        for (_, _, target, dtype), read in zip(spans, found, strict=True):
            target.copy_(torch.from_numpy(read if read.flags.writeable else read.copy()).view(dtype))
