"""An engine in a process of its own answers as one on a thread does, and its end is told."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from calumma.model import load, weights
from calumma.model.document import Document, Text
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.engine_process import EngineProcess
from calumma.serve.pieces import Finished, ImagePiece, Job, Piece, Refused, Started, TextPiece
from calumma.serve.replica import EngineReplica, described
from calumma.serve.settings import ModelSettings

PATIENCE = 300
PROMPT = Document((Text("Draw a three.", "user"),))
LONG = SamplingParams(100, "text", text=PhaseSampling(0.0))


def served(directory: Path, explain: Callable[[Exception], Exception] = lambda error: error) -> EngineReplica:
    engine = EngineProcess(ModelSettings(model=str(directory), max_sequences=4), directory, 1, explain=explain)
    engine.started()
    return EngineReplica(load(directory, read=described), 4, loop=engine, device="cpu")


@pytest.fixture(scope="module")
def apart(model_directory: Path) -> Iterator[EngineReplica]:
    replica = served(model_directory)
    yield replica
    replica.close()
    assert engine_of(replica).failure is None
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(engine_of(replica).pid)


def engine_of(replica: EngineReplica) -> EngineProcess:
    assert isinstance(replica.loop, EngineProcess)
    return replica.loop


async def answer(replica: EngineReplica, job: Job, begun: Callable[[], object] = lambda: None) -> list[Piece]:
    """Its pieces; `begun` is called after the first."""
    found = []
    async with aclosing(replica.generate(job)) as pieces:
        async for piece in pieces:
            found.append(piece)
            if len(found) == 1:
                begun()
    return found


def run(replica: EngineReplica, *jobs: Job) -> list[list[Piece]]:
    async def together() -> list[list[Piece]]:
        return await asyncio.wait_for(asyncio.gather(*(answer(replica, job) for job in jobs)), PATIENCE)

    return asyncio.run(together())


def content(pieces: list[Piece]) -> tuple[str, list[bytes], Piece]:
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    return text, [piece.png for piece in pieces if isinstance(piece, ImagePiece)], pieces[-1]


def test_it_answers_as_an_engine_on_a_thread(apart: EngineReplica, replica: EngineReplica) -> None:
    jobs = [
        Job("text", PROMPT, SamplingParams(40, "text", seed=1), logprobs=2, echo=True),
        Job("image", PROMPT, SamplingParams(mode="image", seed=2), progress=True),
        Job("both", PROMPT, SamplingParams(60, "interleaved", seed=3), begin_with_image=True, max_tokens=60),
    ]
    here, there = run(replica, *jobs), run(apart, *jobs)
    assert [content(pieces) for pieces in there] == [content(pieces) for pieces in here]
    assert [pieces[0] for pieces in there] == [pieces[0] for pieces in here], "prompts, and their echo with scores"
    tokens = [[token for piece in pieces if isinstance(piece, TextPiece) for token in piece.tokens] for pieces in there]
    assert [len(each) > 0 for each in tokens] == [True, False, False]


def test_a_request_it_cannot_take_is_refused_and_disturbs_nobody(apart: EngineReplica) -> None:
    too_long = Job("long", Document((Text("seven " * 200, "user"),)), SamplingParams(4, "text"))
    fine = Job("fine", PROMPT, SamplingParams(4, "text", seed=1))
    [[refused], whole] = run(apart, too_long, fine)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "messages")
    assert isinstance(whole[-1], Finished)


def test_what_nobody_waits_for_is_given_up_and_the_numbers_say_so(apart: EngineReplica) -> None:
    async def leave() -> None:
        async with aclosing(apart.generate(Job("left", PROMPT, LONG))) as pieces:
            assert isinstance(await anext(pieces), Started)
        assert apart.loop.running == 0
        while apart.loop.statistics()["requests_running"] or apart.loop.statistics()["cache_used_ratio"]:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), PATIENCE))
    assert apart.loop.waiting == 0


def test_its_loss_ends_its_streams_with_the_cause_though_it_hangs(model_directory: Path) -> None:
    replica = served(model_directory)
    engine = engine_of(replica)

    def hang_and_fail() -> None:
        os.kill(engine.pid, signal.SIGSTOP)  # as in an exchange with a process that is lost
        asyncio.get_running_loop().run_in_executor(None, engine.fail, RuntimeError("process 2 of 2 was lost"))

    try:
        job = Job("a", PROMPT, LONG)
        [*_, last] = asyncio.run(asyncio.wait_for(answer(replica, job, hang_and_fail), PATIENCE))
        assert last == Refused(500, "the engine stopped: process 2 of 2 was lost", code="engine_failed")
        with pytest.raises(RuntimeError, match="process 2 of 2 was lost"):
            replica.check_health()
        [[refused]] = run(replica, Job("b", PROMPT, LONG))
        assert refused == last
    finally:
        replica.close()


def test_a_killed_one_is_told_as_such_or_by_who_knows_better(model_directory: Path) -> None:
    asked: list[str] = []

    def explain(error: Exception) -> Exception:
        asked.append(str(error))
        return RuntimeError("the other process ran out of memory")

    replica = served(model_directory, explain)
    try:
        kill = lambda: os.kill(engine_of(replica).pid, signal.SIGKILL)  # noqa: E731
        pieces = asyncio.run(asyncio.wait_for(answer(replica, Job("a", PROMPT, LONG), kill), PATIENCE))
        assert asked == ["its process ended with code -9"]
        assert pieces[-1] == Refused(
            500, "the engine stopped: the other process ran out of memory", code="engine_failed"
        )
    finally:
        replica.close()


def test_why_it_does_not_start_is_told(model_directory: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_directory, tmp_path / "model")
    (broken / weights.FILE).write_bytes(b"no weights")
    engine = EngineProcess(ModelSettings(model=str(broken)), broken, 1)
    with pytest.raises(RuntimeError, match=f"the engine did not start: .*{weights.FILE}"):
        engine.started()
    engine.close()


def test_it_ends_when_its_replica_is_lost(model_directory: Path) -> None:
    program = (
        "import sys, time\n"
        "from calumma.serve.engine_process import EngineProcess\n"
        "from calumma.serve.settings import ModelSettings\n"
        "engine = EngineProcess(ModelSettings(model=sys.argv[1]), sys.argv[1], 1)\n"
        "engine.started()\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(model_directory)], stdout=subprocess.PIPE, text=True
    ) as replica:
        assert replica.stdout is not None
        engine = psutil.Process(int(replica.stdout.readline()))
        replica.kill()
    psutil.wait_procs([engine], timeout=PATIENCE)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
