"""Checkpoints in storage: every worker uploads its own DeepSpeed shard, and the manifest that follows makes it one.

OUTPUT/checkpoints/step-00000100/manifest.json             report: step, schedule_step, world_size, tokens, losses, ...
                                 state/*_model_states.pt, state/*_optim_states.pt, latest, zero_to_fp32.py
A checkpoint without a manifest does not exist, so a killed upload leaves the one before it in use.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from calumma.platform import storage
from calumma.platform.config import TrainSpecification
from calumma.platform.data.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)
KIND = "checkpoint"
_TAG = "state"
_NAME = re.compile(r"step-(\d+)/manifest\.json$")

# What may differ between two runs that continue each other: nothing here changes a step that was already taken.
_MAY_CHANGE = {
    "tracking", "resources", "run_name", "steps", "checkpoint_every", "log_every", "held_out", "samples",
    "register_as", "alias", "checkpoint_activations", "compile", "data", "max_epochs",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    uri: str
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps of its own stage that were taken."""
        return int(self.manifest.report["step"])

    @property
    def schedule_step(self) -> int:
        """Steps that were taken over all stages of its schedule."""
        return int(self.manifest.report["schedule_step"])

    @property
    def tokens(self) -> dict[str, float]:
        """Trained tokens by modality, of its own stage."""
        return dict(self.manifest.report["tokens"])


def folder(output: str) -> str:
    return storage.join(output, "checkpoints")


def location(output: str, step: int) -> str:
    return storage.join(folder(output), f"step-{step:08d}")


def newest(output: str, accept: Callable[[Manifest], bool] = lambda manifest: True) -> Checkpoint | None:
    """The whole checkpoint with the most steps among those that `accept` takes."""
    steps = [int(m[1]) for uri in storage.list_files(folder(output)) if (m := _NAME.search(uri))]
    for step in sorted(steps, reverse=True):
        manifest = Manifest.find(location(output, step))
        if manifest is not None and accept(manifest):
            return Checkpoint(location(output, step), manifest)
    return None


def continues(spec: TrainSpecification, inputs: dict[str, str]) -> Callable[[Manifest], bool]:
    """Whether a checkpoint was made by the same training: equal settings that matter, on equal data."""

    def accept(manifest: Manifest) -> bool:
        return (
            lasting(manifest.specification) == lasting(spec.model_dump(mode="json"))
            and manifest.inputs == inputs
            and int(manifest.report["step"]) <= spec.steps
        )

    return accept


def difference(checkpoint: Checkpoint, spec: TrainSpecification, inputs: dict[str, str]) -> str:
    """Why a specification does not go on with a checkpoint that `continues` refuses."""
    found = checkpoint.manifest
    was, now = lasting(found.specification), lasting(spec.model_dump(mode="json"))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed == ["steps"]:
        return (
            f"`steps` was {was['steps']} and is {now['steps']}, and without schedule.total_steps the decay is laid out "
            "over them, so that is another training"
        )
    if changed:
        return f"other settings ({', '.join(changed)})"
    if found.inputs != inputs:
        return f"other data or tokenizers ({', '.join(sorted(_unlike(found.inputs, inputs)))})"
    return f"it is to end after step {spec.steps}"


def _unlike(was: dict[str, str], now: dict[str, str]) -> set[str]:
    return {uri for uri in was.keys() | now.keys() if was.get(uri) != now.get(uri)}


def lasting(specification: dict[str, Any]) -> dict[str, Any]:
    """The part of a training specification that two runs must share for one to go on with the other's checkpoint."""
    kept = {key: value for key, value in specification.items() if key not in _MAY_CHANGE}
    kept = {key: value for key, value in kept.items() if value is not None}  # as before there was such a field
    if (kept.get("schedule") or {}).get("total_steps") is None:
        kept["steps"] = specification.get("steps")  # the decay was laid out over them
    return kept


def fits(checkpoint: Checkpoint, spec: TrainSpecification, world: int) -> bool:
    """Whether its optimizer state is partitioned as this group of workers needs it."""
    report = checkpoint.manifest.report
    ours = (world, spec.zero_stage, spec.precision)
    return (report["world_size"], report["zero_stage"], report["precision"]) == ours


def save(
    engine: DeepSpeedEngine,
    uri: str,
    spec: TrainSpecification,
    inputs: dict[str, str],
    report: dict[str, Any],
) -> None:
    """Write and publish a checkpoint; every worker calls it, and it exists for all of them when it returns."""
    rank = dist.get_rank()
    if rank == 0:
        storage.delete(uri)  # what a killed upload has left
    with tempfile.TemporaryDirectory(prefix="calumma-checkpoint-") as local:
        engine.save_checkpoint(local, tag=_TAG)  # its barriers come after the deletion above
        files = sorted(path for path in Path(local).rglob("*") if path.is_file())
        entries = [entry(path, local) for path in files]
        if files:
            storage.upload(local, uri)
    everyone: list[list[FileEntry] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, entries)
    if rank == 0:
        report = {
            **report,
            "world_size": dist.get_world_size(),
            "zero_stage": spec.zero_stage,
            "precision": spec.precision,
        }
        found = [entry for each in everyone for entry in each or []]
        Manifest(
            kind=KIND, files=found, specification=spec.model_dump(mode="json"), report=report, inputs=inputs
        ).write(uri)
    dist.barrier()


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer and counters into an engine of the same partitioning (see `fits`); every worker calls it."""
    with storage.local_copy(checkpoint.uri) as path:
        loaded, _ = engine.load_checkpoint(str(path), tag=_TAG, load_lr_scheduler_states=False)
    if loaded is None:
        raise storage.StorageError(f"{checkpoint.uri}: DeepSpeed did not find its files in this checkpoint")


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint of any partitioning, float32 on the CPU.

    From ZeRO 1 in bfloat16 they are the rounded ones: DeepSpeed does not put its optimizer's own copy together.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with storage.local_copy(checkpoint.uri) as path:
        report = checkpoint.manifest.report
        if report["zero_stage"] == 0 or (report["zero_stage"], report["precision"]) == (1, "bfloat16"):
            saved = torch.load(path / _TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
            return {name: weight.float() for name, weight in saved["module"].items()}
        merged = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG)
        return {name: weight.clone() for name, weight in merged.items()}


def entry(path: Path, base: str) -> FileEntry:
    """The manifest's entry of a local file below `base`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=digest)
