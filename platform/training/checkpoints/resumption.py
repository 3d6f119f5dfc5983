"""Which checkpoint a training resumes from, and loading its state into the engine of this group."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest, ManifestError
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.checkpoints import ranges
from calumma.platform.training.checkpoints.agreement import gather_messages, raise_on_all
from calumma.platform.training.checkpoints.catalog import find_damage, newest, quarantine
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.checkpoints.layout import Index
from calumma.platform.training.checkpoints.saver import COUNTERS, REPLICATED_FILE
from calumma.platform.training.specification import Resumable

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# What may differ between two runs that continue each other: nothing here changes a step that was already taken.
_FREE_TO_CHANGE = {
    "tracking", "resources", "run_name", "steps", "checkpoint_every", "log_every", "held_out", "samples",
    "register_as", "alias", "checkpoint_activations", "compile", "data", "max_epochs", "zero_stage", "offload",
    "held_out_every", "samples_every", "rows_per_pass", "overlap_communication",
}  # fmt: skip


def agreed_checkpoint(output: str, spec: Resumable, inputs: dict[str, str]) -> Checkpoint | None:
    """The newest checkpoint to go on with, the same on all workers; every worker calls it.

    Of one whose state is not partitioned the content is checked, a share by each worker, and a damaged one set aside.
    The others are checked where they are read (`load`).
    """
    accept = made_by(spec, inputs)
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    while True:
        choice: list[Checkpoint | None] = [newest(output, accept) if rank == 0 else None]
        if not alone:
            dist.broadcast_object_list(choice, src=0)
        checkpoint = choice[0]
        if checkpoint is None:
            return None
        if "counters" in checkpoint.manifest.report:
            return checkpoint
        problems = [message for message in gather_messages(find_damage(checkpoint, (rank, world))) if message]
        if not problems:
            return checkpoint
        if rank == 0:
            quarantine(checkpoint, problems[0])


def made_by(spec: Resumable, inputs: dict[str, str]) -> Callable[[Manifest], bool]:
    """Whether a checkpoint was made by the same training: equal settings that matter, on equal data."""

    def accept(manifest: Manifest) -> bool:
        return (
            _settings(manifest, spec) == resumable_settings(spec.model_dump(mode="json"))
            and manifest.inputs == inputs
            and int(manifest.report["step"]) <= spec.steps
        )

    return accept


def difference(checkpoint: Checkpoint, spec: Resumable, inputs: dict[str, str]) -> str:
    """Why a specification does not go on with a checkpoint that `made_by` refuses."""
    manifest = checkpoint.manifest
    was, now = _settings(manifest, spec), resumable_settings(spec.model_dump(mode="json"))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed == ["steps"]:
        return (
            f"`steps` was {was['steps']} and is {now['steps']}, and without schedule.total_steps the decay is laid out "
            "over them, so that is another training"
        )
    if changed:
        return f"other settings ({', '.join(changed)})"
    if manifest.inputs != inputs:
        return f"other data or tokenizers ({', '.join(sorted(_changed_inputs(manifest.inputs, inputs)))})"
    return f"it is to end after step {spec.steps}"


def _settings(manifest: Manifest, spec: Resumable) -> dict[str, Any]:
    """What a checkpoint was made with; fields that are newer than it have their defaults."""
    try:
        made_with = type(spec).model_validate(manifest.specification).model_dump(mode="json")
    except ValidationError:
        made_with = manifest.specification
    return resumable_settings(made_with)


def _changed_inputs(was: dict[str, str], now: dict[str, str]) -> set[str]:
    return {uri for uri in was.keys() | now.keys() if was.get(uri) != now.get(uri)}


def resumable_settings(specification: dict[str, Any]) -> dict[str, Any]:
    """The part of a training specification that two runs must share for one to go on with the other's checkpoint."""
    kept = {key: value for key, value in specification.items() if key not in _FREE_TO_CHANGE}
    kept = {key: value for key, value in kept.items() if value is not None}  # as before there was such a field
    if (kept.get("schedule") or {}).get("total_steps") is None:
        kept["steps"] = specification.get("steps")  # the decay was laid out over them
    return kept


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint, beat: Callable[[], object] = lambda: None) -> None:
    """Weights, optimizer and counters of a checkpoint into an engine, whatever number of workers and ZeRO stage wrote
    it: each worker reads what it owns. Every worker calls it; `beat` is called as it goes on.

    Raises Damaged on all of them when what one read is not what was written: the checkpoint is set aside then.
    StorageError when it cannot be read.
    """
    owned, counters, failed = OwnedState(engine), checkpoint.manifest.report["counters"], None
    try:
        index = Index.read(checkpoint.uri, checkpoint.manifest, checkpoint.manifest.report["folder"])
        for fragments in owned.filling(list(index.states), counters["step"]):
            ranges.fill(checkpoint.files, index, fragments, list(index.states), beat)
    except (storage.StorageError, ManifestError) as error:
        failed = error
    try:
        raise_on_all(failed)
    except storage.Damaged as damage:
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
    beat: Callable[[], object] = lambda: None,
) -> Checkpoint | None:
    """Load the newest checkpoint whose content is what was written, if there is one. Every worker calls it."""
    while (checkpoint := agreed_checkpoint(output, spec, inputs)) is not None:
        try:
            load(engine, checkpoint, beat=beat)
        except storage.Damaged:  # set aside
            continue
        return checkpoint
    return None


def read_whole(checkpoint: Checkpoint) -> dict[str, Any]:
    """A state that is not partitioned, on the CPU."""
    with storage.open_read(storage.join(checkpoint.files, REPLICATED_FILE)) as file:
        state: dict[str, Any] = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    return state
