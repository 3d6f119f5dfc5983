"""An engine in a process of its own answers as one on a thread does, and its end is told."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from calumma.model import load, weights
from calumma.model.document import Document, Text
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.protocol import (
    Finished,
    GenerationRequest,
    ImageOutput,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
)
from calumma.serve.replica.engine.process import EngineProcess
from calumma.serve.replica.model_loading import without_weights
from calumma.serve.replica.processes import EngineLost
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.settings import ModelSettings

PATIENCE = 300
PROMPT = Document((Text("Draw a three.", "user"),))
LONG = SamplingParams(100, "text", text=PhaseSampling(0.0))


def served(
    directory: Path, explain: Callable[[Exception], Exception] = lambda error: error, **fields: Any
) -> EngineReplica:
    engine = EngineProcess(
        ModelSettings(model=str(directory), max_sequences=4, **fields), directory, 1, explain=explain
    )
    engine.wait_ready()
    return EngineReplica(load(directory, read=without_weights), 4, engine=engine, device="cpu")


@pytest.fixture(scope="module")
def apart(model_directory: Path) -> Iterator[EngineReplica]:
    replica = served(model_directory)
    yield replica
    replica.close()
    assert engine_of(replica).failure is None
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(engine_of(replica).pid)


def engine_of(replica: EngineReplica) -> EngineProcess:
    assert isinstance(replica.engine, EngineProcess)
    return replica.engine


async def output_of(replica: EngineReplica, request: GenerationRequest) -> list[OutputEvent]:
    async with aclosing(replica.generate(request)) as events:
        return [event async for event in events]


def run(replica: EngineReplica, *requests: GenerationRequest) -> list[list[OutputEvent]]:
    async def together() -> list[list[OutputEvent]]:
        return await asyncio.wait_for(asyncio.gather(*(output_of(replica, request) for request in requests)), PATIENCE)

    return asyncio.run(together())


def content(events: list[OutputEvent]) -> tuple[str, list[bytes], OutputEvent]:
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    return text, [event.png for event in events if isinstance(event, ImageOutput)], events[-1]


def test_it_answers_as_an_engine_on_a_thread(apart: EngineReplica, replica: EngineReplica) -> None:
    requests = [
        GenerationRequest("text", PROMPT, SamplingParams(40, "text", seed=1), logprobs=2, echo=True),
        GenerationRequest("image", PROMPT, SamplingParams(mode="image", seed=2), progress=True),
        GenerationRequest(
            "both", PROMPT, SamplingParams(60, "interleaved", seed=3), begin_with_image=True, max_tokens=60
        ),
    ]
    here, there = run(replica, *requests), run(apart, *requests)
    assert [content(events) for events in there] == [content(events) for events in here]
    assert [events[0] for events in there] == [events[0] for events in here], "prompts, and their echo with scores"
    tokens = [[token for event in events if isinstance(event, TextDelta) for token in event.tokens] for events in there]
    assert [len(each) > 0 for each in tokens] == [True, False, False]


def test_a_request_it_cannot_take_is_refused_and_disturbs_nobody(apart: EngineReplica) -> None:
    too_long = GenerationRequest("long", Document((Text("seven " * 200, "user"),)), SamplingParams(4, "text"))
    fine = GenerationRequest("fine", PROMPT, SamplingParams(4, "text", seed=1))
    [[refused], whole] = run(apart, too_long, fine)
    assert isinstance(refused, RequestFailed)
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "messages")
    assert isinstance(whole[-1], Finished)


def test_what_nobody_waits_for_is_given_up_and_the_numbers_say_so(apart: EngineReplica) -> None:
    async def leave() -> None:
        async with aclosing(apart.generate(GenerationRequest("left", PROMPT, LONG))) as events:
            assert isinstance(await anext(events), Started)
        assert apart.engine.running == 0
        gauges = ("requests_running", "requests_waiting", "queued_tokens", "cache_used_ratio")
        while any(apart.engine.statistics()[name] for name in gauges):
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), PATIENCE))
    assert apart.engine.waiting == 0


def test_two_requests_of_one_id_are_not_mixed_up(apart: EngineReplica) -> None:
    both = run(apart, GenerationRequest("same", PROMPT, LONG), GenerationRequest("same", PROMPT, LONG))
    refused, one = sorted(both, key=len)  # which of them is the first is up to the threads that encode
    assert isinstance(one[-1], Finished)
    assert refused == [RequestFailed(400, "a request with the id 'same' is being answered", param="messages")]


def end_of(replica: EngineReplica, end: Callable[[], object]) -> list[OutputEvent]:
    """What a stream brings of an engine that does nothing, and then is ended."""
    os.kill(engine_of(replica).pid, signal.SIGSTOP)

    async def stream() -> list[OutputEvent]:
        found = asyncio.create_task(output_of(replica, GenerationRequest("a", PROMPT, LONG)))
        while not replica.engine.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(end)
        return await found

    return asyncio.run(asyncio.wait_for(stream(), PATIENCE))


def test_its_loss_ends_its_streams_with_the_cause_though_it_hangs(model_directory: Path) -> None:
    replica = served(model_directory)
    lost = EngineLost("process 2 of 2 was lost")
    try:
        refused = RequestFailed(503, "the engine was lost: process 2 of 2 was lost", code="unavailable")
        assert end_of(replica, lambda: engine_of(replica).fail(lost)) == [refused]
        with pytest.raises(RuntimeError, match="process 2 of 2 was lost"):
            replica.check_health()
        assert run(replica, GenerationRequest("b", PROMPT, LONG)) == [[refused]]
    finally:
        replica.close()


def test_an_error_in_a_step_is_told_to_those_who_may_have_been_in_it(model_directory: Path) -> None:
    replica = served(model_directory)
    try:
        refused = RequestFailed(500, "the engine stopped: CUDA error", code="engine_failed")
        assert end_of(replica, lambda: engine_of(replica).fail(RuntimeError("CUDA error"))) == [refused]
        later = RequestFailed(503, "the engine was lost: CUDA error", code="unavailable")
        assert run(replica, GenerationRequest("b", PROMPT, LONG)) == [[later]], "it has no part in that"
    finally:
        replica.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_one_is_no_fault_of_its_requests(model_directory: Path, number: signal.Signals) -> None:
    replica = served(model_directory, explain=lambda error: pytest.fail("there is nothing to explain"))
    try:
        killed = end_of(replica, lambda: [os.kill(engine_of(replica).pid, each) for each in (number, signal.SIGCONT)])
        cause = f"the engine was lost: its process was ended by {number.name}"
        assert killed == [RequestFailed(503, cause, code="unavailable")]
    finally:
        replica.close()


def test_one_that_crashes_is_told_as_such_or_by_who_knows_better(model_directory: Path) -> None:
    asked: list[str] = []

    def explain(error: Exception) -> Exception:
        asked.append(str(error))
        return RuntimeError("the other process ran out of memory")

    replica = served(model_directory, explain)
    try:
        cause = "the engine stopped: the other process ran out of memory"
        crash = [signal.SIGSEGV, signal.SIGCONT]
        crashed = end_of(replica, lambda: [os.kill(engine_of(replica).pid, each) for each in crash])
        assert crashed == [RequestFailed(500, cause, code="engine_failed")]
        assert asked == ["its process ended with code -11"]
    finally:
        replica.close()


def test_what_cannot_be_understood_ends_it_and_its_streams(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = served(model_directory)
    try:
        monkeypatch.setattr(EngineProcess, "_dispatch", lambda *_: pickle.loads(b"no pickle"))
        [[refused]] = run(replica, GenerationRequest("a", PROMPT, LONG))
        assert isinstance(refused, RequestFailed)
        assert refused.code == "engine_failed"
        with pytest.raises(RuntimeError, match="the engine stopped"):
            replica.check_health()
    finally:
        replica.close()


def test_why_it_does_not_start_is_told(model_directory: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_directory, tmp_path / "model")
    (broken / weights.FILE).write_bytes(b"no weights")
    engine = EngineProcess(ModelSettings(model=str(broken)), broken, 1)
    with pytest.raises(RuntimeError, match=f"the engine did not start: .*{weights.FILE}"):
        engine.wait_ready()
    engine.close()


@pytest.mark.parametrize("started", [True, False])
def test_it_ends_when_its_replica_is_lost(model_directory: Path, started: bool) -> None:
    program = (
        "import sys, time\n"
        "from calumma.serve.replica.engine.process import EngineProcess\n"
        "from calumma.serve.settings import ModelSettings\n"
        "engine = EngineProcess(ModelSettings(model=sys.argv[1]), sys.argv[1], 1)\n"
        "print(engine.pid, flush=True)\n"
        "engine.wait_ready()\n"
        "print('started', flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(model_directory)], stdout=subprocess.PIPE, text=True
    ) as replica:
        assert replica.stdout is not None
        engine = psutil.Process(int(replica.stdout.readline()))
        assert not started or replica.stdout.readline() == "started\n"
        replica.kill()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
