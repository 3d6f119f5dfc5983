"""Which checkpoint a training resumes from, and loading its state into the engine of this group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.checkpoints.catalog import find_damage, newest, quarantine
from calumma.platform.training.specification import Resumable, TrainSpecification

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


TAG = "state"  # folder of a checkpoint that holds what DeepSpeed writes

# What may differ between two runs that continue each other: nothing here changes a step that was already taken.
_FREE_TO_CHANGE = {
    "tracking", "resources", "run_name", "steps", "checkpoint_every", "log_every", "held_out", "samples",
    "register_as", "alias", "checkpoint_activations", "compile", "data", "max_epochs", "zero_stage", "offload",
    "held_out_every", "samples_every",
}  # fmt: skip


def agreed_checkpoint(output: str, spec: Resumable, inputs: dict[str, str]) -> Checkpoint | None:
    """The newest checkpoint to go on with whose content is what its manifest says; every worker calls it, reads its
    share, and gets the same checkpoint. Damaged ones are quarantined."""
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
        problems = [message for message in gather_messages(find_damage(checkpoint, (rank, world))) if message]
        if not problems:
            return checkpoint
        if rank == 0:
            quarantine(checkpoint, problems[0])


def gather_messages(message: str) -> list[str]:
    """The messages of all workers, by rank; every worker calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [message]
    messages = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


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


def same_partitioning(checkpoint: Checkpoint, spec: TrainSpecification, world: int) -> bool:
    """Whether its optimizer state is partitioned as this group of workers needs it."""
    return _matches_partitioning(checkpoint, world, spec.zero_stage, spec.precision)


def _matches_partitioning(checkpoint: Checkpoint, world: int, zero_stage: int, precision: str) -> bool:
    report = checkpoint.manifest.report
    same: bool = (report["zero_stage"], report["precision"]) == (zero_stage, precision)
    return same and (zero_stage == 0 or report["world_size"] == world)  # without ZeRO every worker has all of it


def can_restore_optimizer(checkpoint: Checkpoint, spec: TrainSpecification, world: int) -> bool:
    """Whether `load` can bring its optimizer state to this group: as it is, or through the universal format, which
    knows all stages of ZeRO but 0."""
    stages = (checkpoint.manifest.report["zero_stage"], spec.zero_stage)
    return same_partitioning(checkpoint, spec, world) or min(stages) >= 1


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer and counters into an engine that `can_restore_optimizer`; every worker calls it."""
    from calumma.platform.training.checkpoints import universal

    precision = "bfloat16" if engine.bfloat16_enabled() else "float32"
    if not _matches_partitioning(checkpoint, dist.get_world_size(), engine.zero_optimization_stage(), precision):
        universal.load(engine, checkpoint)
        return
    with universal.local_checkpoint(checkpoint.files) as path:
        loaded, _ = engine.load_checkpoint(str(path), tag=TAG, load_lr_scheduler_states=False)
    if loaded is None:
        raise storage.StorageError(f"{checkpoint.uri}: DeepSpeed did not find its files in this checkpoint")


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint of any partitioning, float32 on the CPU.

    From ZeRO 1 in bfloat16 they are the rounded ones: DeepSpeed does not put its optimizer's own copy together.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with storage.local_copy(checkpoint.files) as path:
        report = checkpoint.manifest.report
        if report["zero_stage"] == 0 or (report["zero_stage"], report["precision"]) == (1, "bfloat16"):
            saved = torch.load(path / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
            return {name: weight.float() for name, weight in saved["module"].items()}
        merged = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG)
        return {name: weight.clone() for name, weight in merged.items()}
