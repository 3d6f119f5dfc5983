"""Checkpoints in storage: every worker writes its own DeepSpeed shard, and the manifest that follows makes it one.

OUTPUT/checkpoints/step-00000100/manifest.json             report: step, schedule_step, world_size, tokens, losses, ...
                                 SAVE/state/*_model_states.pt, SAVE/state/*_optim_states.pt
                                 SAVE/parts/00003.json     what worker 3 has written
A checkpoint without a manifest does not exist, so a killed upload leaves the one before it in use. SAVE is new for each
attempt: workers that were given up and still write never touch the files of those that took over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from calumma.platform import storage
from calumma.platform.config import Resumable, Retention, TrainSpecification
from calumma.platform.data.manifest import MANIFEST, FileEntry, Manifest, ManifestError, sha256

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)
KIND = "checkpoint"
DAMAGED = "damaged.json"
_TAG = "state"
_NAME = re.compile(r"step-(\d+)/manifest\.json$")
_FOLDER = re.compile(r"(step-(\d+))/")

# What may differ between two runs that continue each other: nothing here changes a step that was already taken.
_MAY_CHANGE = {
    "tracking", "resources", "run_name", "steps", "checkpoint_every", "log_every", "held_out", "samples",
    "register_as", "alias", "checkpoint_activations", "compile", "data", "max_epochs", "zero_stage", "offload",
    "held_out_every", "samples_every",
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

    @property
    def files(self) -> str:
        """The folder that DeepSpeed knows as the checkpoint's."""
        return storage.join(self.uri, self.manifest.report.get("folder", ""))


def folder(output: str) -> str:
    return storage.join(output, "checkpoints")


def location(output: str, step: int) -> str:
    return storage.join(folder(output), f"step-{step:08d}")


def published(output: str) -> list[int]:
    """Steps of all checkpoints that have a manifest, newest first."""
    return sorted({int(m[1]) for uri in storage.list_files(folder(output)) if (m := _NAME.search(uri))}, reverse=True)


def newest(output: str, accept: Callable[[Manifest], bool] = lambda manifest: True) -> Checkpoint | None:
    """The checkpoint with the most steps among those that `accept` takes and whose files are all there at their size;
    one that is not so is passed over with a warning."""
    for step in published(output):
        uri = location(output, step)
        try:
            manifest = Manifest.find(uri)
            if manifest is None or not accept(manifest):
                continue
            manifest.verify(uri)
        except ManifestError as error:
            logger.warning("the checkpoint after step %d is not whole, looking for an older one: %s", step, error)
            continue
        return Checkpoint(uri, manifest)
    return None


def damage(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the content of a checkpoint's files, by their checksums; empty when nothing is.

    `share` is (rank, world): each worker reads its part of the files.
    """
    rank, world = share
    for entry in checkpoint.manifest.files[rank::world]:
        try:
            if sha256(storage.join(checkpoint.uri, entry.path)) != entry.sha256:
                return f"the content of {entry.path} is not what the manifest says"
        except storage.StorageError as error:
            return str(error)
    return ""


def set_aside(checkpoint: Checkpoint, why: str) -> None:
    """Take a damaged checkpoint out of use: its manifest becomes `damaged.json`, its files stay to be looked at."""
    told = {"why": why, "manifest": checkpoint.manifest.model_dump(mode="json")}
    storage.write_bytes(storage.join(checkpoint.uri, DAMAGED), json.dumps(told).encode())
    storage.delete(storage.join(checkpoint.uri, MANIFEST))
    logger.warning("the checkpoint after step %d is damaged and set aside: %s", checkpoint.step, why)


def resumption(output: str, spec: Resumable, inputs: dict[str, str]) -> Checkpoint | None:
    """The newest checkpoint to go on with whose content is what its manifest says; every worker calls it, reads its
    share, and gets the same answer. Damaged ones are set aside."""
    accept = continues(spec, inputs)
    alone = not dist.is_initialized()
    rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    while True:
        given: list[Checkpoint | None] = [newest(output, accept) if rank == 0 else None]
        if not alone:
            dist.broadcast_object_list(given, src=0)
        found = given[0]
        if found is None:
            return None
        wrong = [told for told in everyone(damage(found, (rank, world))) if told]
        if not wrong:
            return found
        if rank == 0:
            set_aside(found, wrong[0])


def newest_step(output: str) -> int:
    """Steps that the newest published checkpoint has; -1 when there is none."""
    return max(published(output), default=-1)


def everyone(mine: str) -> list[str]:
    """What each worker of the group has to say."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    told = [""] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return told


def continues(spec: Resumable, inputs: dict[str, str]) -> Callable[[Manifest], bool]:
    """Whether a checkpoint was made by the same training: equal settings that matter, on equal data."""

    def accept(manifest: Manifest) -> bool:
        return (
            _settings(manifest, spec) == lasting(spec.model_dump(mode="json"))
            and manifest.inputs == inputs
            and int(manifest.report["step"]) <= spec.steps
        )

    return accept


def difference(checkpoint: Checkpoint, spec: Resumable, inputs: dict[str, str]) -> str:
    """Why a specification does not go on with a checkpoint that `continues` refuses."""
    found = checkpoint.manifest
    was, now = _settings(found, spec), lasting(spec.model_dump(mode="json"))
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


def _settings(manifest: Manifest, spec: Resumable) -> dict[str, Any]:
    """What a checkpoint was made with; fields that are newer than it have their defaults."""
    try:
        made_with = type(spec).model_validate(manifest.specification).model_dump(mode="json")
    except ValidationError:
        made_with = manifest.specification
    return lasting(made_with)


def _unlike(was: dict[str, str], now: dict[str, str]) -> set[str]:
    return {uri for uri in was.keys() | now.keys() if was.get(uri) != now.get(uri)}


def lasting(specification: dict[str, Any]) -> dict[str, Any]:
    """The part of a training specification that two runs must share for one to go on with the other's checkpoint."""
    kept = {key: value for key, value in specification.items() if key not in _MAY_CHANGE}
    kept = {key: value for key, value in kept.items() if value is not None}  # as before there was such a field
    if (kept.get("schedule") or {}).get("total_steps") is None:
        kept["steps"] = specification.get("steps")  # the decay was laid out over them
    return kept


def alike(checkpoint: Checkpoint, spec: TrainSpecification, world: int) -> bool:
    """Whether its optimizer state is partitioned as this group of workers needs it."""
    return _partitioned(checkpoint, world, spec.zero_stage, spec.precision)


def _partitioned(checkpoint: Checkpoint, world: int, zero_stage: int, precision: str) -> bool:
    report = checkpoint.manifest.report
    alike: bool = (report["zero_stage"], report["precision"]) == (zero_stage, precision)
    return alike and (zero_stage == 0 or report["world_size"] == world)  # without ZeRO every worker has all of it


def fits(checkpoint: Checkpoint, spec: TrainSpecification, world: int) -> bool:
    """Whether `load` can bring its optimizer state to this group: as it is, or through the universal format, which
    knows all stages of ZeRO but 0."""
    stages = (checkpoint.manifest.report["zero_stage"], spec.zero_stage)
    return alike(checkpoint, spec, world) or min(stages) >= 1


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer and counters into an engine that it `fits`; every worker calls it."""
    from calumma.platform.training import universal

    precision = "bfloat16" if engine.bfloat16_enabled() else "float32"
    if not _partitioned(checkpoint, dist.get_world_size(), engine.zero_optimization_stage(), precision):
        universal.load(engine, checkpoint)
        return
    with universal.on_this_node(checkpoint.files) as path:
        loaded, _ = engine.load_checkpoint(str(path), tag=_TAG, load_lr_scheduler_states=False)
    if loaded is None:
        raise storage.StorageError(f"{checkpoint.uri}: DeepSpeed did not find its files in this checkpoint")


def weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint of any partitioning, float32 on the CPU.

    From ZeRO 1 in bfloat16 they are the rounded ones: DeepSpeed does not put its optimizer's own copy together.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with storage.local_copy(checkpoint.files) as path:
        report = checkpoint.manifest.report
        if report["zero_stage"] == 0 or (report["zero_stage"], report["precision"]) == (1, "bfloat16"):
            saved = torch.load(path / _TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
            return {name: weight.float() for name, weight in saved["module"].items()}
        merged = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_TAG)
        return {name: weight.clone() for name, weight in merged.items()}


def save(
    engine: DeepSpeedEngine,
    uri: str,
    spec: TrainSpecification,
    inputs: dict[str, str],
    report: dict[str, Any],
) -> None:
    """Write and publish a checkpoint; every worker calls it, and it exists for all of them when it returns.

    Raises StorageError on all of them when one could not write its part. `saver.Saver` does it without the wait.
    """
    from calumma.platform.training.saver import Saver

    with Saver(spec, inputs) as saver:
        saver.save(engine, uri, report)
        saver.settle()


def retain(output: str, retention: Retention) -> list[int]:
    """Delete the checkpoints that need not stay, and what killed uploads before the newest have left; the steps kept.

    One worker calls it, when no upload is under way.
    """
    steps = published(output)
    kept = set(steps[: retention.last])
    if retention.every is not None:
        kept |= {step for step in steps if step % retention.every == 0}
    if retention.best:
        kept |= set(_best(output, steps)[: retention.best])
    present = {int(m[2]) for uri in storage.list_files(folder(output)) if (m := _FOLDER.search(uri))}
    for step in sorted(present - kept):
        if steps and step < steps[0]:
            storage.delete(location(output, step))
    return sorted(kept)


def _best(output: str, steps: Iterable[int]) -> list[int]:
    """Steps by the loss their checkpoint reports, held-out where there is one; those without a loss are left out."""
    found: list[tuple[float, int]] = []
    for step in steps:
        manifest = Manifest.find(location(output, step))
        loss = None if manifest is None else manifest.report.get("held_out_loss", manifest.report.get("loss"))
        if loss is not None:
            found.append((float(loss), step))
    return [step for _, step in sorted(found)]


def entry(path: Path, base: str) -> FileEntry:
    """The manifest's entry of a local file below `base`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=digest)
