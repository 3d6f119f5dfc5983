"""A replica whose model several processes hold together (tensor parallelism, see model/generation/tensor_parallel.py).

The first of them is the replica's engine process (engine_process.py); the others are Ray actors in the replica's
placement group, so on its node. They meet through a TCP store of the replica's: tensors on GPUs go by NCCL, all else by
gloo. They end together: the others when the first closes its engine, or the replica is lost (Ray ends the actors of a
lost owner); the replica ends the first when another is lost, even while they still meet.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from calumma.model import config
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.generation import Engine, Shard, read_shard
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.serve.settings import ModelSettings

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ACTOR = "CALUMMA_RANK::"  # how names of the other processes' actors begin
# Most time of an exchange between the processes; an engine without work makes one every half minute (loop.py).
PATIENCE = timedelta(minutes=10)
NOTICE = 5.0  # seconds until Ray knows that a process is lost, whose connections have been closed
ENDING = 10.0  # seconds from the engine's end to the end of the processes that follow it


@dataclass(frozen=True)
class Nodes:
    """Nodes of a kind."""

    resources: Mapping[str, float]
    count: float = 1


def bundle(settings: ModelSettings) -> dict[str, float]:
    """What Ray reserves for one process of a replica."""
    share = {"CPU": settings.cpus_per_replica, "GPU": settings.gpus_per_replica}
    parts = settings.tensor_parallel
    return {name: math.ceil(round(1e4 * much / parts, 6)) / 1e4 for name, much in share.items() if much}


def precision(settings: ModelSettings) -> tuple[str, torch.dtype]:
    """Where a replica computes, and in what."""
    device, usual = ("cuda", "bfloat16") if settings.gpus_per_replica else ("cpu", "float32")
    return device, getattr(torch, settings.dtype or usual)


def require_heads(settings: ModelSettings, source: str) -> None:
    """Raises ValueError where the model at a path or URI has too few heads for the processes that shall hold it."""
    if settings.tensor_parallel > 1 and ("://" not in source or source.startswith(("s3://", "file://"))):
        shape = ModelConfig.model_validate_json(storage.read_bytes(storage.join(source, config.FILE)))
        _check_heads(settings, shape)


def _check_heads(settings: ModelSettings, shape: ModelConfig) -> None:
    try:
        Shard(0, settings.tensor_parallel).heads(shape)
    except ValueError as error:
        raise ValueError(f"tensor_parallel {settings.tensor_parallel} of {settings.model}: {error}") from error


def require_room(settings: ModelSettings, nodes: Iterable[Nodes]) -> None:
    """Raises ValueError where `min_replicas` could never run on these nodes, however idle; each is on one node."""
    if settings.tensor_parallel == 1:
        return
    need = {name: much * settings.tensor_parallel for name, much in bundle(settings).items()}
    nodes = list(nodes)

    def fitting(node: Nodes) -> int:
        return min(math.floor(node.resources.get(name, 0.0) / much + 1e-9) for name, much in need.items())

    room = sum(fitting(node) * node.count for node in nodes if fitting(node))
    if room < settings.min_replicas:
        found = "; ".join(" and ".join(f"{node.resources.get(name, 0.0):g} {name}" for name in need) for node in nodes)
        raise ValueError(
            f"{settings.min_replicas} replica(s) of {settings.model} with tensor_parallel {settings.tensor_parallel} "
            f"need {' and '.join(f'{much:g} {name}' for name, much in need.items())} on one node each, and the cluster "
            f"has room for {room:g} (its nodes: {found}); use a smaller tensor_parallel, fewer replicas or larger "
            "nodes; where an autoscaler would add a node, start one first"
        )


def nodes_of_cluster() -> list[Nodes]:
    """The nodes there are, and those of which an autoscaler has told Ray that it may add them."""
    import ray

    there = [Nodes(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    with contextlib.suppress(Exception):  # a Ray client, or a cluster without an autoscaler, knows of none
        for group in ray._private.state.state.get_cluster_config().node_group_configs:
            if group.max_count:
                there.append(Nodes(dict(group.resources), math.inf if group.max_count < 0 else group.max_count))
    return there


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a replica meet."""

    host: str
    port: int


def join(meeting: Meeting, rank: int, settings: ModelSettings) -> Shard:
    """This process's part, in torch.distributed's default group."""
    count = settings.tensor_parallel
    if settings.gpus_per_replica:
        # Ray shows an actor its own GPU alone; the first process sees what the replica has, which is one as well.
        torch.cuda.set_device(0)
    store = dist.TCPStore(meeting.host, meeting.port, count, is_master=False, timeout=PATIENCE)
    backend = "cpu:gloo,cuda:nccl" if settings.gpus_per_replica else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    return Shard.of(None)


def read_own(directory: str, shard: Shard, settings: ModelSettings) -> Transformer:
    """This process's part of the model."""
    return read_shard(directory, shard, *precision(settings))


def all_here(shard: Shard) -> None:
    """Wait for all processes. On the CPU, so that the loss of one is noticed at once."""
    shard.sum(torch.zeros(1))


class Follower:
    """The actor of a process that is not the first."""

    def follow(self, settings: ModelSettings, directory: str, threads: int, rank: int, meeting: Meeting) -> None:
        """Hold a part of the model until the first process closes its engine."""
        torch.set_num_threads(threads)
        try:
            shard = join(meeting, rank, settings)
            transformer = read_own(directory, shard, settings)
            codes = ImageTokenizerConfig.read(Path(directory) / IMAGE_TOKENIZER).codes_per_image
            vocabulary = Vocabulary.read(directory)
            all_here(shard)
            Engine(transformer, vocabulary, codes, shard=shard, **settings.engine_options).follow()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # closes the connections: the others notice at once


class Ranks:
    """The other processes of a replica, as it sees them. Made within the replica's actor."""

    def __init__(self, settings: ModelSettings, directory: Path, threads: int) -> None:
        """Start them; they wait for the first at `meeting`. Raises ValueError where the model cannot be cut so."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        _check_heads(settings, ModelConfig.read(directory))
        place = ray.util.get_current_placement_group()
        if place is None or len(place.bundle_specs) < settings.tensor_parallel:
            raise RuntimeError(
                f"a replica with tensor_parallel {settings.tensor_parallel} runs in a placement group with a bundle "
                "for each process, found none: deploy it with `calumma serve start`"
            )
        name = (ray.get_runtime_context().get_actor_name() or "").removeprefix("SERVE_REPLICA::")
        each = bundle(settings)
        host = "127.0.0.1"  # one node
        self._store = dist.TCPStore(
            host, 0, settings.tensor_parallel, is_master=True, timeout=PATIENCE, wait_for_workers=False
        )
        self.meeting = Meeting(host, self._store.port)
        self._closed = False
        self._count = settings.tensor_parallel
        follower: Any = ray.remote(Follower)
        self._actors: list[ActorHandle[Any]] = [
            follower.options(
                name=f"{ACTOR}{name}#{rank}",
                namespace="serve",
                num_cpus=each["CPU"],
                num_gpus=each.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(1, settings.tensor_parallel)
        ]
        self._ends: list[Any] = [
            actor.follow.remote(settings, str(directory), threads, rank, self.meeting)
            for rank, actor in enumerate(self._actors, 1)
        ]

    def watch(self, lost: Callable[[Exception], None]) -> None:
        """Call `lost`, on a thread, as soon as a process ends that was not told to."""
        threading.Thread(target=self._watch, args=(lost,), name="ranks", daemon=True).start()

    def _watch(self, lost: Callable[[Exception], None]) -> None:
        import ray

        left = list(self._ends)
        while left:
            ended, left = ray.wait(left, num_returns=1)
            if self._closed:
                return
            if failure := self._failure(ended):
                lost(failure)
                return

    def cause(self, error: Exception) -> Exception:
        """Why something failed here: the loss of another process, where there is one soon, or the error itself."""
        import ray

        ended, _ = ray.wait(self._ends, num_returns=1, timeout=NOTICE)
        return self._failure(ended) or error

    def _failure(self, ended: list[Any]) -> RuntimeError | None:
        """How one of the processes that have ended did so; None: as it was told to."""
        import ray

        for end in ended:
            try:
                ray.get(end)
            except ray.exceptions.RayError as error:
                rank = self._ends.index(end) + 1
                why = getattr(error, "cause", None) or error
                first = str(why).strip().splitlines()[0] if str(why).strip() else ""
                return RuntimeError(
                    f"process {rank + 1} of the {self._count} that hold the model was lost: "
                    f"{type(why).__name__}: {first}"
                )
        return None

    def close(self) -> None:
        """Leave in order, when the engine is closed."""
        import ray

        if self._closed:
            return
        ray.wait(self._ends, num_returns=len(self._ends), timeout=ENDING)
        self.abandon()

    def abandon(self) -> None:
        """End the other processes, whatever they do."""
        import ray

        self._closed = True
        for actor in self._actors:
            ray.kill(actor)
