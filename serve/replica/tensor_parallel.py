"""A replica whose model is sharded over several processes (model/generation/tensor_parallel.py).

Rank 0 is the replica's engine process (engine/process.py); the other ranks are Ray actors in the replica's placement
group, so on its node. They meet through a TCP store of the replica's: tensors on GPUs go by NCCL, all else by gloo.
They end together: the actors when rank 0 closes its engine, or the replica is lost (Ray ends the actors of a lost
owner); the replica ends rank 0 when an actor is lost, even while they still meet.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.generation import Engine, Shard
from calumma.model.tokenizers.grammar import GrammarCompiler
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.replica.memory import memory_budget
from calumma.serve.replica.model_loading import read_own_weights
from calumma.serve.replica.processes import STOPPED, EngineLost, process_state
from calumma.serve.settings import ModelSettings

if TYPE_CHECKING:
    from ray.actor import ActorHandle


ACTOR_PREFIX = "CALUMMA_RANK::"  # how the actors' names begin
# An engine without work takes part in a collective operation every half minute (HEARTBEAT of engine/thread.py).
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
LOSS_NOTICE_SECONDS = 5.0  # from a lost process's closed connections until Ray knows of the loss
SHUTDOWN_SECONDS = 10.0  # from the engine's end to that of the actors


def bundle(settings: ModelSettings) -> dict[str, float]:
    """What Ray reserves for one rank: a bundle of the replica's placement group."""
    share = {"CPU": settings.cpus_per_replica, "GPU": settings.gpus_per_replica}
    parts = settings.tensor_parallel
    return {name: math.ceil(round(1e4 * much / parts, 6)) / 1e4 for name, much in share.items() if much}


def require_divisible_heads(settings: ModelSettings, shape: ModelConfig) -> None:
    """Raises ValueError where the heads do not divide by the number of ranks."""
    try:
        Shard(0, settings.tensor_parallel).heads(shape)
    except ValueError as error:
        raise ValueError(f"tensor_parallel {settings.tensor_parallel} of {settings.model}: {error}") from error


@dataclass(frozen=True)
class Rendezvous:
    """Address of the TCP store through which the ranks meet."""

    host: str
    port: int


def join_process_group(rendezvous: Rendezvous, rank: int, settings: ModelSettings) -> Shard:
    """This rank's shard, in torch.distributed's default group. Waits for the other ranks."""
    world_size = settings.tensor_parallel
    if settings.gpus_per_replica:
        # Ray shows an actor its own GPU alone; rank 0 sees what the replica has, which is one as well.
        torch.cuda.set_device(0)
    store = dist.TCPStore(rendezvous.host, rendezvous.port, world_size, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if settings.gpus_per_replica else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return Shard.of(None)


def barrier(shard: Shard) -> None:
    """Wait for all ranks. On the CPU, so that the loss of one is noticed at once."""
    shard.sum(torch.zeros(1))


class TensorParallelWorker:
    """The actor of a rank other than 0."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, settings: ModelSettings, directory: str, threads: int, rank: int, rendezvous: Rendezvous) -> None:
        """Run the forward passes of a shard until rank 0 closes its engine."""
        torch.set_num_threads(threads)
        try:
            shard = join_process_group(rendezvous, rank, settings)
            transformer = read_own_weights(directory, settings, shard)
            images = ImageTokenizerConfig.read(Path(directory) / IMAGE_TOKENIZER)
            vocabulary = Vocabulary.read(directory)
            grammars = GrammarCompiler(TextTokenizer.read(directory), vocabulary)
            barrier(shard)
            options = settings.engine_options | {"memory": memory_budget(settings, transformer.config, images)}
            codes = images.codes_per_image
            Engine(transformer, vocabulary, codes, shard=shard, constraints=grammars, **options).follow()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # closes the connections: the others notice at once


class WorkerGroup:
    """The actors of a replica's ranks from 1 on. Made within the replica's actor."""

    def __init__(self, settings: ModelSettings, directory: Path, threads: int) -> None:
        """Start them; they wait for rank 0 at `rendezvous`. Raises ValueError where the model cannot be sharded so."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        require_divisible_heads(settings, ModelConfig.read(directory))
        placement = ray.util.get_current_placement_group()
        if placement is None or len(placement.bundle_specs) < settings.tensor_parallel:
            raise RuntimeError(
                f"a replica with tensor_parallel {settings.tensor_parallel} runs in a placement group with a bundle "
                "for each process, found none: deploy it with `calumma serve start`"
            )
        name = (ray.get_runtime_context().get_actor_name() or "").removeprefix("SERVE_REPLICA::")
        each = bundle(settings)
        host = "127.0.0.1"  # one node
        self._store = dist.TCPStore(
            host, 0, settings.tensor_parallel, is_master=True, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False
        )
        self.rendezvous = Rendezvous(host, self._store.port)
        self._closed = False
        self._world_size = settings.tensor_parallel
        worker: Any = ray.remote(TensorParallelWorker)
        self._actors: list[ActorHandle[Any]] = [
            worker.options(
                name=f"{ACTOR_PREFIX}{name}#{rank}",
                namespace="serve",
                num_cpus=each["CPU"],
                num_gpus=each.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(1, settings.tensor_parallel)
        ]
        self._pids: list[Any] = [actor.pid.remote() for actor in self._actors]
        self._runs: list[Any] = [
            actor.run.remote(settings, str(directory), threads, rank, self.rendezvous)
            for rank, actor in enumerate(self._actors, 1)
        ]

    def watch(self, on_loss: Callable[[Exception], None]) -> None:
        """Call `on_loss`, on a thread, as soon as an actor ends that was not told to."""
        threading.Thread(target=self._watch, args=(on_loss,), name="tensor parallel", daemon=True).start()

    def _watch(self, on_loss: Callable[[Exception], None]) -> None:
        import ray

        left = list(self._runs)
        while left:
            ended, left = ray.wait(left, num_returns=1)
            if self._closed:
                return
            if failure := self._failure(ended):
                on_loss(failure)
                return

    def explain(self, error: Exception) -> Exception:
        """The cause of an error of rank 0: the loss of an actor, where there is one soon, or the error itself."""
        import ray

        ended, _ = ray.wait(self._runs, num_returns=1, timeout=LOSS_NOTICE_SECONDS)
        return self._failure(ended) or error

    def _failure(self, ended: list[Any]) -> RuntimeError | None:
        """How one of the actors that have ended failed; None: it ended as it was told to."""
        import ray

        for run in ended:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                rank = self._runs.index(run) + 1
                why = getattr(error, "cause", None) or error
                first = str(why).strip().splitlines()[0] if str(why).strip() else ""
                kind = EngineLost if isinstance(error, ray.exceptions.RayActorError) else RuntimeError
                return kind(
                    f"process {rank + 1} of the {self._world_size} that hold the model was lost: "
                    f"{type(why).__name__}: {first}"
                )
        return None

    def stopped(self) -> str | None:
        """Says which of the processes, all on this node, a signal has stopped."""
        import ray

        for rank, pid in enumerate(self._pids, 1):
            told, _ = ray.wait([pid], timeout=0)
            if told and (state := process_state(ray.get(pid))) in STOPPED:
                of = f"process {rank + 1} of the {self._world_size} that hold the model"
                return f"{of} was stopped by a signal ({state})"
        return None

    def close(self) -> None:
        """Let the actors end after their engines; then end them."""
        import ray

        if self._closed:
            return
        ray.wait(self._runs, num_returns=len(self._runs), timeout=SHUTDOWN_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the actors, whatever they do."""
        import ray

        self._closed = True
        for actor in self._actors:
            ray.kill(actor)
