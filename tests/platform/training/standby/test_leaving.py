"""A worker that lives on when another is lost is, in the same process, a worker of the next group."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from calumma.platform.training.standby import recall
from calumma.platform.training.standby.copies import Copies
from calumma.platform.training.standby.keeper import Keeper
from calumma.platform.training.standby.leaving import leave_group
from tests.platform.training.checkpoints.test_checkpoints import join, report, specification, started, steps
from tests.platform.training.standby.test_memory import Node

LAST = 6


@pytest.fixture
def keepers() -> Iterator[list[Keeper]]:
    """Two, in a process of their own."""
    node = Node()
    node.start()
    yield [node.Keeper("a"), node.Keeper("a")]  # type: ignore[attr-defined]
    node.shutdown()


def attempt(number: int, rank: int, keeper: Keeper, notes: str, dies_at: int = -1) -> None:
    """All steps to the last from where memory is, as one of two workers of the group of that number."""
    join(rank, 2, f"{notes}-meeting-{number}")
    run = started(spec := specification(notes, zero_stage=number + 1), 2, seed=number)
    held = recall.newest(keeper.holdings())
    if held is not None:
        recall.load(run, held, "a", lambda name: keeper)
    first = held.step if held else 0
    copies = Copies(lambda: [keeper], every=1, first=first)
    for step in range(first, LAST):
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen = steps(run, spec, 2, rank, step, step + 1)
        copies.after_step(run, step + 1, report(step + 1))
        with Path(f"{notes}-{os.getpid()}").open("a") as file:
            file.write(f"{json.dumps([number, *seen[0]])}\n")


def lives_on(keeper: Keeper, notes: str) -> None:
    try:
        attempt(0, 0, keeper, notes)
    except RuntimeError as error:  # gloo's: the connection is closed
        leave_group(error)
        assert not dist.is_initialized()
        attempt(1, 0, keeper, notes)


def test_a_process_goes_on_in_another_group(tmp_path: Path, keepers: list[Keeper]) -> None:
    """One of two workers is killed in step 4. The other takes steps 4 to 6 in the process that took 1 to 3, at another
    ZeRO stage, with a new worker; losses are those of two workers that nobody killed."""
    for name in ("torch._dynamo", "deepspeed.runtime.engine"):
        importlib.import_module(name)
    fork, notes, (keeper, other) = multiprocessing.get_context("fork"), str(tmp_path / "run"), keepers
    living = fork.Process(target=lives_on, args=(keeper, notes))
    killed = fork.Process(target=attempt, args=(0, 1, keeper, notes, 3))
    for process in (living, killed):
        process.start()
    killed.join()
    spare = fork.Process(target=attempt, args=(1, 1, keeper, notes))
    spare.start()
    for process in (living, spare):
        process.join()
    assert (living.exitcode, killed.exitcode, spare.exitcode) == (0, -signal.SIGKILL, 0)
    found = [json.loads(line) for line in Path(f"{notes}-{living.pid}").read_text().splitlines()]
    assert [(number, step) for number, step, *_ in found] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]

    plain = str(tmp_path / "plain")
    pair = [fork.Process(target=attempt, args=(0, rank, other, plain)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    straight = [json.loads(line) for line in Path(f"{plain}-{pair[0].pid}").read_text().splitlines()]
    assert [loss for _, _, loss, _ in found] == pytest.approx([loss for _, _, loss, _ in straight], rel=1e-6)
