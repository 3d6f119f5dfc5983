"""A worker that lives on when another is lost is, in the same process, a worker of the next group; a spare is ready."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import TrackingError, connect
from calumma.platform.training.standby import recall, rehearsal
from calumma.platform.training.standby.copies import Copies
from calumma.platform.training.standby.keeper import Keeper
from calumma.platform.training.standby.leaving import GroupLost, Interruptible, leave_finished, leave_group
from calumma.platform.training.steps import engine
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


# -- a step that is of no use --


def ended(work: Callable[[Interruptible], None]) -> tuple[BaseException | None, Interruptible]:
    """What a thread's work was ended by, and what it can be ended with."""
    found: list[BaseException | None] = [None]
    given: list[Interruptible] = []

    def run() -> None:
        given.append(Interruptible())
        try:
            work(given[0])
        except BaseException as error:
            found[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0], given[0]


def test_a_step_ends_in_the_middle_of_its_backward_pass() -> None:
    """Fifty layers, whose gradients are looked at one by one as DeepSpeed does; the group is lost at the third."""
    seen: list[int] = []

    def step(interruptible: Interruptible) -> None:
        x = torch.ones(1, requires_grad=True)
        for layer in range(50):
            x = x * 1.5
            x.register_hook(lambda gradient, layer=layer: look(layer))

        def look(layer: int) -> None:
            seen.append(layer)
            if len(seen) == 3:
                other = threading.Thread(target=interruptible.end)
                other.start()
                other.join()

        with interruptible:
            x.backward()

    error, _ = ended(step)
    assert isinstance(error, GroupLost)
    assert seen[:3] == [49, 48, 47]
    assert len(seen) < 6


def test_an_end_that_is_swallowed_comes_when_the_step_does() -> None:
    def step(interruptible: Interruptible) -> None:
        with interruptible, suppress(GroupLost):
            interruptible.end()
            for _ in range(1000):
                pass
        raise AssertionError("it went on")

    assert isinstance(ended(step)[0], GroupLost)


def test_nothing_but_a_step_is_ended() -> None:
    """Cleaning up after it, say, is not; nor is there a second end for one group."""

    def step(interruptible: Interruptible) -> None:
        interruptible.end()
        with interruptible:
            pass
        interruptible.end()

    error, interruptible = ended(step)
    assert error is None
    interruptible.end()


# -- a training that has ended well --


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_an_engine_that_is_released_is_freed_before_the_next(tmp_path: Path, zero_stage: int) -> None:
    freed = tmp_path / "freed"
    one = multiprocessing.get_context("fork").Process(target=train_and_leave, args=(tmp_path, zero_stage, freed))
    one.start()
    one.join(300)
    assert freed.read_text() == "[True, True]"


def train_and_leave(folder: Path, zero_stage: int, freed: Path) -> None:
    found = []
    for turn in range(2):
        join(0, 1, f"{folder}/meeting-{turn}")
        spec = specification(str(folder), zero_stage=zero_stage)
        run = started(spec, 1)
        steps(run, spec, 1, 0, 0, 1)
        parameters = weakref.ref(run), *(weakref.ref(p) for p in run.module.parameters())
        engine.release(run)
        del run
        assert leave_finished()
        found.append(not any(reference() is not None for reference in parameters))
    freed.write_text(str(found))


def test_a_process_that_cannot_leave_its_group_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("a group that cannot be left")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", fails)
    assert not leave_finished()


# -- a spare --

SPARE = """
import pickle, sys
from functools import partial
import torch.distributed as dist
from calumma.platform.training import loop
from calumma.platform.training.standby.leaving import preload
from calumma.platform.training.standby.rehearsal import rehearse_step
from tests.platform.training.checkpoints.test_checkpoints import VOCABULARY, join, specification, started, steps

spec = specification(sys.argv[1], zero_stage=1)
rehearsal = partial(rehearse_step, spec, VOCABULARY) if sys.argv[2] == "rehearses" else None
preload(pickle.dumps((loop.train_from_newest, rehearsal)))
assert not dist.is_initialized()
known = set(sys.modules)
join(0, 1, sys.argv[1] + "/meeting")
((step, loss, norm),) = steps(started(spec, 1), spec, 1, 0, 0, 1)
print(len(set(sys.modules) - known), loss, norm)
"""


@pytest.mark.parametrize("rehearses", [True, False])
def test_a_spare_that_has_rehearsed_finds_everything_imported(tmp_path: Path, rehearses: bool) -> None:
    """A process that has only imported what the loop imports meets hundreds of modules at its first real step, one that
    has rehearsed none; the step is that of a process that has done neither."""
    command = [sys.executable, "-c", SPARE, str(tmp_path), "rehearses" if rehearses else "does not"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not rehearse" not in done.stderr
    imported, loss, norm = map(float, done.stdout.split()[-3:])
    assert imported == 0 if rehearses else imported > 100
    plain = tmp_path / "plain.json"
    one = multiprocessing.get_context("fork").Process(target=first_step, args=(tmp_path, plain))
    one.start()
    one.join()
    assert [loss, norm] == pytest.approx(json.loads(plain.read_text()), rel=1e-6)


METRICS = """
import sys
import mlflow
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training.standby.rehearsal import rehearse_tracking

run = Run(sys.argv[1], sys.argv[2])
if sys.argv[3] == "rehearses":
    rehearse_tracking(run)
known = set(sys.modules)
writer = BackgroundWriter(run)
writer.log({"loss": 1.0}, 1)
writer.close()
print(len(set(sys.modules) - known), run.latest()["loss"])
"""


@pytest.mark.parametrize("rehearses", [True, False])
def test_a_spare_that_has_rehearsed_writes_metrics_at_once(tmp_path: Path, rehearses: bool) -> None:
    """Or else it imports MLflow's database store, beside the first step."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = connect(uri).create_run("0").info.run_id
    command = [sys.executable, "-c", METRICS, uri, run, "rehearses" if rehearses else "does not"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, loss = done.stdout.split()
    assert loss == "1.0"
    assert int(imported) < 20 if rehearses else int(imported) > 100


def test_a_database_that_this_host_does_not_have_is_not_made(tmp_path: Path) -> None:
    rehearsal.rehearse_tracking(Run(f"sqlite:///{tmp_path}/elsewhere/mlflow.db", "run"))
    assert not list(tmp_path.iterdir())


def test_a_tracking_server_that_is_away_keeps_no_spare_from_being_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Away(Run):
        def latest(self) -> dict[str, float]:
            asked.set()
            answer.wait()
            raise TrackingError("away")

    monkeypatch.setattr(rehearsal, "_PATIENCE", 0.01)
    rehearsal.rehearse_tracking(Away("http://127.0.0.1:9", "run"))
    assert asked.wait(60)
    answer.set()


def first_step(folder: Path, found: Path) -> None:
    join(0, 1, f"{folder}/other-meeting")
    spec = specification(str(folder), zero_stage=1)
    ((_, loss, norm),) = steps(started(spec, 1), spec, 1, 0, 0, 1)
    found.write_text(json.dumps([loss, norm]))
