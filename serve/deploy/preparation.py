"""What must hold before an endpoint starts: whole models, room for the replicas, a free port."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from calumma.model import config
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, missing_files
from calumma.model.generation.cache.device_memory import HostMemory
from calumma.platform import storage
from calumma.platform.specification import Tracking
from calumma.platform.tracking import registry
from calumma.serve.replica.memory import plan
from calumma.serve.replica.tensor_parallel import bundle, require_divisible_heads
from calumma.serve.settings import ModelSettings


class ServeError(RuntimeError):
    """Serving cannot start as asked; the message says what was found and what to do."""


STORED = ("s3://", "gs://", "az://", "file://")  # a model directory in storage; others are of an MLflow server


@dataclass(frozen=True)
class NodeGroup:
    """Nodes with equal resources (CPU, GPU); math.inf of them where an autoscaler has no limit."""

    resources: Mapping[str, float]
    count: float = 1


def require_heads(settings: ModelSettings, source: str) -> None:
    """Raises ValueError where the model at a path or URI cannot be sharded as the settings ask."""
    if settings.tensor_parallel > 1 and ("://" not in source or source.startswith(STORED)):
        shape = ModelConfig.model_validate_json(storage.read_bytes(storage.join(source, config.FILE)))
        require_divisible_heads(settings, shape)


def require_room(settings: ModelSettings, nodes: Iterable[NodeGroup]) -> None:
    """Raises ValueError where `min_replicas` could never run on these nodes, however idle; each is on one node."""
    if settings.tensor_parallel == 1:
        return
    replica = {name: amount * settings.tensor_parallel for name, amount in bundle(settings).items()}
    nodes = list(nodes)

    def fitting(node: NodeGroup) -> int:
        return min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in replica.items())

    room = sum(fitting(node) * node.count for node in nodes if fitting(node))
    if room < settings.min_replicas:
        found = "; ".join(
            " and ".join(f"{node.resources.get(name, 0.0):g} {name}" for name in replica) for node in nodes
        )
        raise ValueError(
            f"{settings.min_replicas} replica(s) of {settings.model} with tensor_parallel {settings.tensor_parallel} "
            f"need {' and '.join(f'{amount:g} {name}' for name, amount in replica.items())} on one node each, and the "
            f"cluster has room for {room:g} (its nodes: {found}); use a smaller tensor_parallel, fewer replicas or "
            "larger nodes; where an autoscaler would add a node, start one first"
        )


def nodes_of_cluster() -> list[NodeGroup]:
    """The nodes that are alive, and those that an autoscaler may add."""
    import ray

    groups = [NodeGroup(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    with contextlib.suppress(Exception):  # a Ray client, or a cluster without an autoscaler, knows of none
        for group in ray._private.state.state.get_cluster_config().node_group_configs:
            if group.max_count:
                groups.append(NodeGroup(dict(group.resources), math.inf if group.max_count < 0 else group.max_count))
    return groups


def locate_directory(model: str, settings: Tracking | None = None) -> str:
    """The URI or absolute path of the model directory that `model` names, proven to be a whole one.

    Raises TrackingError, StorageError or ServeError, each saying what was looked for.
    """
    source = registry.model_source(model, settings)
    if "://" not in source:
        source = str(Path(source).expanduser().resolve())
    elif not source.startswith(STORED):
        return source  # an artifact of an MLflow server: the replica downloads it
    origin = "" if source == model else f" ({model} leads there)"
    if not storage.exists(source):
        raise ServeError(f"there is no model directory at {source}{origin}")
    missing = missing_files(lambda name: storage.exists(storage.join(source, name)))
    if missing and storage.exists(storage.join(source, "adapter_config.json")):
        raise ServeError(f"{source}{origin} is an adapter: serve the model that it was trained on, with --adapter")
    if missing:
        raise ServeError(f"{source}{origin} is not a whole model directory: {', '.join(missing)} missing")
    return source


def locate_servable(model: ModelSettings) -> str:
    """`locate_directory` of a model that can be sharded as its settings ask. Raises ServeError too where it cannot."""
    source = locate_directory(model.model, model.tracking)
    try:
        require_heads(model, source)
        require_adapters(model, source)
    except ValueError as error:
        raise ServeError(str(error)) from error
    return source


def require_adapters(model: ModelSettings, source: str) -> None:
    """Raises ValueError where an adapter is none for the model at a path or URI."""
    if model.adapters and ("://" not in source or source.startswith(("s3://", "file://"))):
        from calumma.serve.replica.model_loading import read_adapters

        read_adapters(model, ModelConfig.model_validate_json(storage.read_bytes(storage.join(source, config.FILE))))


def require_memory(model: ModelSettings, source: str, total: int | None = None) -> None:
    """Raises ServeError where a replica of the model at a path or URI does not fit the devices of this machine, of so
    many bytes."""
    if "://" in source and not source.startswith(STORED):
        return
    shape = ModelConfig.model_validate_json(storage.read_bytes(storage.join(source, config.FILE)))
    pictures = storage.read_bytes(storage.join(source, IMAGE_TOKENIZER, config.FILE))
    if total is None and model.gpus_per_replica:
        total = smallest_gpu()
        if total is None:  # that is told otherwise
            return
    try:
        images = ImageTokenizerConfig.model_validate_json(pictures)
        plan(model, shape, images, HostMemory().total if total is None else total)
    except ValueError as error:
        raise ServeError(str(error)) from error


def smallest_gpu() -> int | None:
    """Bytes of the GPU that has the fewest; None: there is none."""
    import torch

    return min(
        (torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())), default=None
    )


def require_port(host: str, port: int) -> None:
    """Raises ServeError when another process listens at the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen at {host}:{port} ({error.strerror}); choose another with --port, or see who has it: "
                f"ss -ltnp 'sport = :{port}'"
            ) from error
