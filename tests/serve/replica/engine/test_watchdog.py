"""An engine that has work and gets nothing done is ended, whatever it does instead, and one that works is not."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model import load
from calumma.model.document import Document, Text
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.protocol import Finished, GenerationRequest, OutputEvent, RequestFailed, Started
from calumma.serve.replica.engine import process as process_module
from calumma.serve.replica.engine import watchdog
from calumma.serve.replica.engine.process import EngineProcess
from calumma.serve.replica.engine.watchdog import StallDetector, StepCounter
from calumma.serve.replica.model_loading import without_weights
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ModelSettings

PATIENCE = 300
STALL = 2.0
PROMPT = Document((Text("Draw a three.", "user"),))
LONG = SamplingParams(100, "text", text=PhaseSampling(0.0))

# What an engine's process runs instead of its module: its steps hang on a prompt that ends with the word "hang".
HANGING = """
import runpy, sys, time
from calumma.model.generation import Engine
step = Engine.step
hanging = set()
def hang(engine):
    while not hanging <= set(engine._known) or not hanging:
        return step(engine)
    while True:
        {wait}
add = Engine.add
def note(engine, request):
    add(engine, request)
    if request.id == "hang":
        hanging.add(request.id)
Engine.step, Engine.add = hang, note
runpy.run_module("calumma.serve.replica.engine.main", run_name="__main__", alter_sys=True)
"""


def served(directory: Path, stall: float = STALL) -> EngineReplica:
    settings = ModelSettings(model=str(directory), max_sequences=4, stall_seconds=stall)
    engine = EngineProcess(settings, directory, 1)
    engine.wait_ready()
    return EngineReplica(load(directory, read=without_weights), 4, engine=engine, device="cpu")


@pytest.fixture
def replica(model_directory: Path) -> Iterator[EngineReplica]:
    replica = served(model_directory)
    yield replica
    replica.close()


def engine_of(replica: EngineReplica) -> EngineProcess:
    assert isinstance(replica.engine, EngineProcess)
    return replica.engine


async def answer(replica: EngineReplica, id: str) -> list[OutputEvent]:
    async with aclosing(replica.generate(GenerationRequest(id, PROMPT, LONG))) as events:
        return [event async for event in events]


def run(*work: object) -> list[list[OutputEvent]]:
    async def together() -> list[list[OutputEvent]]:
        return await asyncio.wait_for(asyncio.gather(*work), PATIENCE)  # type: ignore[arg-type]

    return asyncio.run(together())


def test_a_stopped_one_is_no_fault_of_its_requests(replica: EngineReplica, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(run(answer(replica, "before"))[0][-1], Finished)
    os.kill(engine_of(replica).pid, signal.SIGSTOP)
    with caplog.at_level(logging.ERROR):
        [[lost]] = run(answer(replica, "a"))
    assert isinstance(lost, RequestFailed)
    assert (lost.status, lost.code) == (503, "unavailable")
    assert "finished no step in" in lost.message
    assert "stopped by a signal" in lost.message
    assert "a process that is stopped cannot tell them" in caplog.text
    with pytest.raises(RuntimeError, match="stopped by a signal"):
        replica.check_health()  # by which Ray Serve replaces it
    assert not psutil.pid_exists(engine_of(replica).pid)


def test_a_stopped_one_is_not_waited_for_as_long_as_a_step_may_take(model_directory: Path) -> None:
    replica = served(model_directory, stall=10 * PATIENCE)
    try:
        os.kill(engine_of(replica).pid, signal.SIGSTOP)
        [[lost]] = run(answer(replica, "a"))
        assert isinstance(lost, RequestFailed)
        assert "stopped by a signal" in lost.message
    finally:
        replica.close()


def test_a_stopped_one_is_noticed_though_its_clients_have_gone(replica: EngineReplica) -> None:
    os.kill(engine_of(replica).pid, signal.SIGSTOP)

    async def leave() -> None:
        waiting = asyncio.create_task(answer(replica, "a"))
        while not replica.engine.running:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(leave())
    assert replica.engine.running == 0
    assert "stopped by a signal" in str(engine_of(replica).wait_ended())


@pytest.mark.parametrize("wait", ["time.sleep(1)", "pass"])
def test_one_that_hangs_keeps_its_stacks_and_its_requests_to_itself(
    wait: str,
    model_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Asleep, or spinning with the interpreter's lock."""
    (tmp_path / "hanging_engine.py").write_text(HANGING.replace("{wait}", wait))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(process_module, "MODULE", "hanging_engine")
    monkeypatch.setattr(watchdog, "LATE_SECONDS", STALL / 2)
    replica = served(model_directory)

    async def both() -> list[list[OutputEvent]]:
        hanging = asyncio.create_task(answer(replica, "hang"))
        while not engine_of(replica)._stall.late:
            await asyncio.sleep(0.01)
        return await asyncio.gather(hanging, answer(replica, "later"))

    try:
        assert isinstance(run(answer(replica, "before"))[0][-1], Finished)
        with caplog.at_level(logging.ERROR):
            [hung, later] = asyncio.run(asyncio.wait_for(both(), PATIENCE))
    finally:
        replica.close()
    assert isinstance(hung[-1], RequestFailed)
    assert (hung[-1].status, hung[-1].code) == (500, "engine_failed"), "never to be tried elsewhere"
    assert isinstance(later[-1], RequestFailed)
    assert (later[-1].status, later[-1].code) == (503, "unavailable"), "the step had begun without it"
    assert "hanging_engine.py" in caplog.text
    assert " in hang\n" in caplog.text
    assert "Its 2 requests: hang, later" in caplog.text


def test_an_engine_that_works_or_has_nothing_to_do_is_left_alone(replica: EngineReplica) -> None:
    end = time.monotonic() + 2 * STALL
    number = 0
    while time.monotonic() < end:
        number += 1
        [events] = run(answer(replica, str(number)))
        assert isinstance(events[-1], Finished)
    time.sleep(1.5 * STALL)
    assert not engine_of(replica)._stall.late

    async def leave() -> None:
        async with aclosing(replica.generate(GenerationRequest("left", PROMPT, LONG))) as events:
            assert isinstance(await anext(events), Started)

    asyncio.run(leave())
    time.sleep(1.5 * STALL)
    assert engine_of(replica).failure is None


# ---- what it goes by


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), st.floats(0, 3)), max_size=60))
def test_only_time_with_work_and_without_a_step_counts(looks: list[tuple[int, bool, float]]) -> None:
    detector = StallDetector(5.0)
    steps, seconds = 0, 0.0
    detector.look(steps, False, 0.0)
    for finished, pending, elapsed in looks:
        steps += finished
        seconds = seconds + elapsed if pending and not finished else 0.0
        assert detector.look(steps, pending, elapsed) == (seconds >= 5.0)


def test_a_pause_of_the_watcher_is_no_stall() -> None:
    detector = StallDetector(120.0)
    detector.look(7, True, 0.5)
    assert not detector.look(7, True, 10_000.0)
    assert detector.seconds == watchdog.MOST_OBSERVED
    assert not any(StallDetector(None).look(7, True, 5.0) for _ in range(1000))


def test_steps_are_counted_in_shared_memory() -> None:
    descriptor = StepCounter.new_descriptor()
    ours, theirs = StepCounter(descriptor), StepCounter(os.dup(descriptor))
    os.close(descriptor)
    for _ in range(3):
        theirs.add()
    assert ours.value == 3
