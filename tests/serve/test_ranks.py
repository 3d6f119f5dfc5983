"""A replica of several processes: what it needs, what is refused, and what happens when its engine cannot go on."""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import aclosing
from pathlib import Path

import pytest

from calumma.model import MixedModalModel
from calumma.model.document import Document, Text
from calumma.model.generation import Engine, Event, SamplingParams, Shard
from calumma.serve import loop
from calumma.serve.app import ServeError, find
from calumma.serve.pieces import Job, Piece, Refused, Started
from calumma.serve.ranks import Nodes, bundle, require_room
from calumma.serve.replica import EngineReplica
from calumma.serve.settings import ModelSettings

PROMPT = Document((Text("Draw a three.", "user"),))


def test_processes_share_the_cpus_of_a_replica_and_have_a_gpu_each() -> None:
    assert bundle(ModelSettings(model="m", cpus_per_replica=0.57)) == {"CPU": 0.57}
    assert bundle(ModelSettings(model="m", cpus_per_replica=1, tensor_parallel=3)) == {"CPU": 0.3334}
    gpus = ModelSettings(model="m", cpus_per_replica=8, gpus_per_replica=4, tensor_parallel=4)
    assert bundle(gpus) == {"CPU": 2, "GPU": 1}
    with pytest.raises(
        ValueError, match=r"tensor_parallel 4: its processes have a GPU each.* must be 4, or 0.* given 2"
    ):
        ModelSettings(model="m", gpus_per_replica=2, tensor_parallel=4)


def test_more_processes_than_heads_are_refused_before_anything_starts(model_directory: Path) -> None:
    fits = ModelSettings(model=str(model_directory), tensor_parallel=2)
    assert find(fits) == str(model_directory)
    with pytest.raises(ServeError, match=r"tensor_parallel 5 of /.*2 heads cannot be cut into 5 parts: use at most 2"):
        find(fits.model_copy(update={"tensor_parallel": 5}))


def test_a_cluster_without_a_node_for_a_replica_is_told() -> None:
    settings = ModelSettings(
        model="m", gpus_per_replica=4, cpus_per_replica=4, tensor_parallel=4, min_replicas=2, max_replicas=2
    )
    large, small = {"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 2.0}
    require_room(settings, [Nodes(large)])
    require_room(settings, [Nodes(small), Nodes(large, math.inf)])  # an autoscaler may add some
    with pytest.raises(ValueError, match="need 4 CPU and 4 GPU on one node each, and the cluster has room for 0 "):
        require_room(settings, [Nodes(small)] * 8)
    with pytest.raises(ValueError, match=r"room for 1 \(its nodes: 16 CPU and 4 GPU; 64 CPU and 2 GPU\)"):
        require_room(settings, [Nodes(large | {"GPU": 4.0}), Nodes(small)])
    require_room(settings.model_copy(update={"tensor_parallel": 1}), [])  # Ray waits for room, as it always did


def test_streams_end_although_the_engine_waits_for_a_lost_process(
    model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, returns = threading.Event(), threading.Event()

    def step(engine: Engine) -> list[Event]:
        stuck.set()
        returns.wait()  # as an exchange on GPUs does
        return []

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(loop, "STUCK", 0.01)
    replica = EngineReplica(model)

    async def pieces() -> list[Piece]:
        found = []
        async with aclosing(replica.generate(Job("a", PROMPT, SamplingParams()))) as answer:
            async for piece in answer:
                found.append(piece)
                if isinstance(piece, Started):
                    await asyncio.to_thread(stuck.wait)
                    await asyncio.to_thread(replica.loop.fail, RuntimeError("process 2 of 2 was lost"))
        return found

    try:
        last = asyncio.run(asyncio.wait_for(pieces(), 300))[-1]
        assert isinstance(last, Refused)
        assert (last.code, last.message) == ("engine_failed", "the engine stopped: process 2 of 2 was lost")
        with pytest.raises(RuntimeError, match="process 2 of 2 was lost"):
            replica.check_health()
    finally:
        returns.set()
        replica.close()


def test_an_engine_without_work_is_heard_by_the_others_and_lets_them_go_in_the_end(
    model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    beaten = threading.Semaphore(0)

    def step(engine: Engine) -> list[Event]:
        done.append("step")
        beaten.release()
        return []

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(Engine, "close", lambda engine: done.append("close"))
    monkeypatch.setattr(loop, "HEARTBEAT", 0.001)
    replica = EngineReplica(model, shard=Shard())
    assert beaten.acquire(timeout=300)
    assert beaten.acquire(timeout=300)
    replica.close()
    assert done[-1] == "close"
    assert set(done[:-1]) == {"step"}


def test_the_cause_of_a_failure_is_told_rather_than_its_effect(
    model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(engine: Engine) -> list[Event]:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(Engine, "close", lambda engine: pytest.fail("nobody is there to be told"))
    replica = EngineReplica(model, explain=lambda error: RuntimeError("process 2 of 2 was lost"))

    async def last() -> Piece:
        async with aclosing(replica.generate(Job("a", PROMPT, SamplingParams()))) as answer:
            return [piece async for piece in answer][-1]

    refused = asyncio.run(asyncio.wait_for(last(), 300))
    replica.close()
    assert isinstance(refused, Refused)
    assert refused.message == "the engine stopped: process 2 of 2 was lost"
