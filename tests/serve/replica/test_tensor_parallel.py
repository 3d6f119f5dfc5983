"""A replica of several processes: what each reserves, and what happens when its engine cannot go on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from calumma.model import MixedModalModel
from calumma.model.generation import Engine, Event, Shard
from calumma.serve.replica.engine import thread
from calumma.serve.replica.engine.process import EngineProcess
from calumma.serve.replica.replica import EngineReplica
from calumma.serve.replica.tensor_parallel import Rendezvous, bundle
from calumma.serve.settings import ModelSettings


def test_processes_share_the_cpus_of_a_replica_and_have_a_gpu_each() -> None:
    assert bundle(ModelSettings(model="m", cpus_per_replica=0.57)) == {"CPU": 0.57}
    assert bundle(ModelSettings(model="m", cpus_per_replica=1, tensor_parallel=3)) == {"CPU": 0.3334}
    gpus = ModelSettings(model="m", cpus_per_replica=8, gpus_per_replica=4, tensor_parallel=4)
    assert bundle(gpus) == {"CPU": 2, "GPU": 1}
    with pytest.raises(
        ValueError, match=r"tensor_parallel 4: its processes have a GPU each.* must be 4, or 0.* given 2"
    ):
        ModelSettings(model="m", gpus_per_replica=2, tensor_parallel=4)


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
    monkeypatch.setattr(thread, "HEARTBEAT", 0.001)
    replica = EngineReplica(model, shard=Shard())
    assert beaten.acquire(timeout=300)
    assert beaten.acquire(timeout=300)
    replica.close()
    assert done[-1] == "close"
    assert set(done[:-1]) == {"step"}


def test_a_process_lost_while_they_meet_is_not_waited_for(model_directory: Path) -> None:
    settings = ModelSettings(model=str(model_directory), tensor_parallel=2)
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    engine = EngineProcess(settings, model_directory, 1, Rendezvous("127.0.0.1", store.port))
    while not store.num_keys() and engine.failure is None:  # until the first has come
        time.sleep(0.01)
    engine.fail(RuntimeError("process 2 of 2 was lost"))
    with pytest.raises(RuntimeError, match="the engine did not start: process 2 of 2 was lost"):
        engine.wait_ready()
    engine.close()
