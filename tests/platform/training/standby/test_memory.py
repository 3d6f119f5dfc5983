"""The training state in the memory of processes that outlive its workers: what is read back after workers and nodes
were killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessException

from calumma.platform.training.checkpoints import layout
from calumma.platform.training.standby import recall
from calumma.platform.training.standby.copies import Copies
from calumma.platform.training.standby.keeper import Keeper
from calumma.platform.training.standby.segment import Part, RecordTooLong, Segment
from tests.platform.training.checkpoints.test_checkpoints import in_a_group, join, report, specification, started, steps

STATES = {"fp32": torch.float32, "exp_avg": torch.float32}
Nodes = dict[str, Any]


class Node(BaseManager):
    """A process with a keeper in it, which can be killed."""


Node.register("Keeper", Keeper)


@pytest.fixture
def nodes() -> Iterator[Callable[..., Nodes]]:
    """nodes(*names): keepers in processes of their own, each of which copies to the next."""
    managers: list[Node] = []

    def start(*names: str) -> Nodes:
        keepers = {}
        for name in names:
            managers.append(manager := Node())
            manager.start()
            keepers[name] = manager.Keeper(name)  # type: ignore[attr-defined]
        for name, following in zip(names, [*names[1:], *names[:1]], strict=True):
            if following != name:
                keepers[name].follow(keepers[following])
        return keepers

    yield start
    for manager in managers:
        manager.shutdown()


def group_of_workers(
    rank: int, world: int, stage: int, first: int, last: int, keepers: Nodes, homes: list[str], killed: int, notes: str
) -> None:
    """Steps `first` to `last` - 1 of a worker whose node is `homes[rank]`, from memory on; worker `killed` dies in the
    middle of the last. Losses go to a file, step by step."""
    join(rank, world, f"{notes}-meeting-{first}-{last}-{world}")
    spec = specification(notes, zero_stage=stage)
    run = started(spec, world, seed=first)
    held = recall.newest(recall.held_by(keepers, keepers.__getitem__))
    if first:
        assert held is not None
        assert (held.step, held.manifest.report["tokens"]) == (first, {"step": first})
        recall.load(run, held, homes[rank], keepers.__getitem__)
    own = homes[rank]
    copies = Copies(lambda: [keepers[own], *(k for n, k in keepers.items() if n != own)], every=1, first=first)
    for step in range(first, last):
        if rank == killed and step == last - 1:
            Path(f"{notes}-{step}-killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        seen = steps(run, spec, world, rank, step, step + 1)
        copies.after_step(run, step + 1, report(step + 1, tokens={"step": step + 1}))
        if rank == 0:
            Path(f"{notes}-{step}.json").write_text(json.dumps(seen[0]))


def losses(notes: str, last: int) -> list[float]:
    return [json.loads(Path(f"{notes}-{step}.json").read_text())[1] for step in range(last)]


def killed_in(step: int, notes: str, function: Callable[[], None]) -> None:
    """Of the two ends, the killed worker's and that of the other, whose connection is reset, either is told first; the
    step in which it was killed has no loss."""
    with pytest.raises(ProcessException, match=r"SIGKILL|Connection"):
        function()
    assert Path(f"{notes}-{step}-killed").is_file()
    assert not Path(f"{notes}-{step}.json").exists()


def until_replicated(keepers: Nodes, step: int, times: int) -> None:
    """Wait until so many copies of parts have a step."""
    while sum(holding.step == step for keeper in keepers.values() for holding in keeper.holdings()) < times:
        pass


def test_a_worker_killed_in_a_step_loses_no_step_and_changes_no_loss(
    tmp_path: Path, nodes: Callable[..., Nodes]
) -> None:
    """Two workers at ZeRO 1, one is killed: from memory on at the step before, on two workers, then on three at ZeRO 3;
    then one whole node is gone, and what its workers had comes from its peer."""
    keepers, straight, notes = nodes("a", "b"), str(tmp_path / "straight"), str(tmp_path / "run")
    in_a_group(group_of_workers, 2, 1, 0, 8, nodes("c"), ["c", "c"], -1, straight)
    killed_in(3, notes, lambda: in_a_group(group_of_workers, 2, 1, 0, 4, keepers, ["a", "b"], 1, notes))
    killed_in(5, notes, lambda: in_a_group(group_of_workers, 2, 1, 3, 6, keepers, ["a", "b"], 0, notes))
    in_a_group(group_of_workers, 3, 3, 5, 7, keepers, ["a", "b", "b"], -1, notes)
    until_replicated(keepers, step=7, times=6)
    left = {"a": keepers["a"]}  # node b is lost, with two of three workers
    in_a_group(group_of_workers, 1, 1, 7, 8, left, ["a"], -1, notes)
    assert losses(notes, 8) == pytest.approx(losses(straight, 8), rel=1e-6)


def test_where_a_part_is_lost_with_its_peer_nothing_is_held(tmp_path: Path, nodes: Callable[..., Nodes]) -> None:
    """Three nodes in a ring: any one may go; of two that stand beside each other the first one's part is gone."""
    keepers = nodes("a", "b", "c")
    in_a_group(group_of_workers, 3, 1, 0, 2, keepers, ["a", "b", "c"], -1, str(tmp_path / "run"))
    until_replicated(keepers, step=2, times=6)

    def newest(*left: str) -> int | None:
        found = recall.newest(recall.held_by(left, keepers.__getitem__))
        return found.step if found else None

    assert newest("a", "b", "c") == newest("a", "b") == newest("b", "c") == newest("a", "c") == 2
    assert newest("a") is newest("b") is newest("c") is newest() is None


def part(rank: int = 0, world: int = 1, group: str = "one", numels: tuple[int, ...] = (5, 3)) -> Part:
    ranges = [(f"weight{number}", 0, numel) for number, numel in enumerate(numels)]
    names = [name for name, _, _ in ranges]
    _, found = layout.part_layout(ranges, STATES, names)
    return Part(group, rank, world, found._replace(begin=0), STATES, tuple(names))


def fill(segment: Segment, step: int, value: float, incarnation: str = "first") -> None:
    slot = segment.begin()
    for tensor in segment.tensors(slot):
        tensor.fill_(value)
    segment.commit(slot, step, json.dumps({"incarnation": incarnation, "report": {"step": step}}).encode())


def test_a_writer_that_dies_leaves_the_step_before(tmp_path: Path) -> None:
    memory = Segment(part())
    writer = Segment(memory.part, memory.path)
    fill(writer, 1, 1.0)
    fill(writer, 2, 2.0)
    assert [found.step for found in memory.filled()] == [2, 1]
    writer.tensors(writer.begin())[0].fill_(9.0)  # and here it dies
    (left,) = memory.filled()
    assert left.step == 2
    assert all(bool((tensor == 2.0).all()) for tensor in memory.tensors(left.slot))
    with pytest.raises(RecordTooLong, match="step 3"):
        writer.commit(writer.begin(), 3, b" " * (2 << 20))
    memory.close()


def test_a_slot_that_is_written_while_it_is_read_is_not_taken() -> None:
    memory = Segment(part())
    fill(memory, 1, 1.0)
    slot = memory.filled()[0].slot
    assert memory.read(slot, 1, [(0, 8)]) is not None
    fill(memory, 2, 2.0)
    fill(memory, 3, 3.0)  # where step 1 was
    assert memory.read(slot, 1, [(0, 8)]) is None
    memory.close()


def test_steps_of_two_groups_are_never_mixed() -> None:
    """One worker of two wrote step 5 before a group that went on from storage took it again; the other did after."""
    keeper = Keeper("a")
    memories = [Segment(p, keeper.reserve(p)) for p in (part(0, 2), part(1, 2))]
    fill(memories[0], 5, 1.0, "first")
    fill(memories[1], 5, 2.0, "second")
    assert recall.newest(keeper.holdings()) is None
    fill(memories[1], 4, 2.0, "first")
    fill(memories[0], 4, 1.0, "first")
    found = recall.newest(keeper.holdings())
    assert found is not None
    assert found.step == 4
    keeper.close()


def test_a_group_that_starts_over_earlier_takes_later_steps_away() -> None:
    keeper = Keeper("a")
    memory = Segment(part(), keeper.reserve(part()))
    fill(memory, 11, 1.0)
    fill(memory, 12, 1.0)
    memory.forget_after(10)
    assert keeper.holdings() == []
    for step in (11, 12, 13):
        fill(memory, step, 2.0, "second")
    assert [holding.step for holding in keeper.holdings()] == [13, 12]
    keeper.accept(part(group="peer's"), 7, b'{"incarnation": "x", "report": {}}', np.ones(64, np.uint8))
    keeper.keep_only("one")
    assert {holding.part.group for holding in keeper.holdings()} == {"one"}
    keeper.forget()
    assert keeper.holdings() == []
    keeper.close()
