"""Which checkpoint a training resumes from, and loading its state into the engine of this group."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest, ManifestError
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.checkpoints import identity, ranges
from calumma.platform.training.checkpoints.agreement import gather_messages, raise_on_all
from calumma.platform.training.checkpoints.catalog import find_damage, newest, quarantine
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.checkpoints.layout import Index
from calumma.platform.training.checkpoints.node_local import node_local
from calumma.platform.training.checkpoints.saver import COUNTERS, REPLICATED_FILE
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.specification import Resumable

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def agreed_checkpoint(
    output: str, spec: Resumable, inputs: dict[str, str], origin: Checkpoint | None = None
) -> Checkpoint | None:
    """The newest checkpoint to go on with, or else the `origin` of a branch, the same on all workers; every worker
    calls it.

    Of one whose state is not partitioned the content is checked, a share by each worker, and a damaged one set aside.
    The others are checked where they are read (`load`).
    """
    accept = identity.made_by(spec, inputs)
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    while True:
        choice: list[Checkpoint | None] = [newest(output, accept) if rank == 0 else None]
        if not alone:
            dist.broadcast_object_list(choice, src=0)
        checkpoint = choice[0]
        if checkpoint is None:
            return origin
        if "counters" in checkpoint.manifest.report:
            return checkpoint
        found = find_damage(checkpoint.uri, checkpoint.manifest, (rank, world))
        problems = [message for message in gather_messages(found) if message]
        if not problems:
            return checkpoint
        if rank == 0:
            quarantine(checkpoint, problems[0])


def require_undamaged(uri: str, manifest: Manifest) -> None:
    """What is started from must be what its manifest says; every worker calls it, reads its share, and learns of the
    others'. Raises TrainingFailed on all of them."""
    alone = not dist.is_initialized()
    share = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    problems = [message for message in gather_messages(find_damage(uri, manifest, share)) if message]
    if problems:
        raise _damaged(uri, problems[0])


def _damaged(uri: str, problem: object) -> TrainingFailed:
    return TrainingFailed(
        f"{uri} is damaged, and nothing is started from it: {problem}. Restore it from a copy, or start from another"
    )


def load(
    engine: DeepSpeedEngine,
    checkpoint: Checkpoint,
    own: bool = True,
    beat: Callable[[], object] = lambda: None,
    spec: Resumable | None = None,
) -> None:
    """Weights, optimizer and counters of a checkpoint into an engine, whatever number of workers and ZeRO stage wrote
    it: each worker reads what it owns, from copies on its host's disk where the `spec` has such. Every worker calls it;
    `beat` is called as it goes on.

    Raises Damaged on all of them when what one read is not what was written: the checkpoint is set aside then. Of one
    that is not this training's `own` it raises TrainingFailed. StorageError when it cannot be read.
    """
    copies_here = node_local(spec) if spec is not None else None
    owned, counters, failed = OwnedState(engine), checkpoint.manifest.report["counters"], None
    try:
        index = Index.read(checkpoint.uri, checkpoint.manifest, checkpoint.manifest.report["folder"])
        for fragments in owned.filling(list(index.states), counters["step"]):
            ranges.fill(checkpoint.files, index, fragments, list(index.states), beat, copies_here)
    except (storage.StorageError, ManifestError) as error:
        failed = error
    try:
        raise_on_all(failed)
    except storage.Damaged as damage:
        if not own:
            raise _damaged(checkpoint.uri, damage) from damage
        if dist.get_rank() == 0:
            quarantine(checkpoint, str(damage))
        raise
    owned.settle()
    for name in COUNTERS:
        setattr(engine, name, counters[name])


def load_newest(
    engine: DeepSpeedEngine,
    output: str,
    spec: Resumable,
    inputs: dict[str, str],
    origin: Checkpoint | None = None,
    beat: Callable[[], object] = lambda: None,
) -> Checkpoint | None:
    """Load the newest checkpoint whose content is what was written, or else the `origin` of a branch, if there is one.
    Every worker calls it."""
    while (checkpoint := agreed_checkpoint(output, spec, inputs, origin)) is not None:
        try:
            load(engine, checkpoint, own=checkpoint != origin, beat=beat, spec=spec)
        except storage.Damaged:  # set aside
            continue
        return checkpoint
    return None


def read_whole(checkpoint: Checkpoint) -> dict[str, Any]:
    """A state that is not partitioned, on the CPU."""
    with storage.open_read(storage.join(checkpoint.files, REPLICATED_FILE)) as file:
        state: dict[str, Any] = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    return state
