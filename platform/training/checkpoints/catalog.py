"""Checkpoints in storage: which there are, which are whole, which stay.

OUTPUT/checkpoints/step-00000100/manifest.json (last) and the files of every worker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path

from calumma.platform import storage
from calumma.platform.specification import Retention
from calumma.platform.storage.lease import Fence, OutputTaken
from calumma.platform.storage.manifest import MANIFEST, FileEntry, Manifest, ManifestError, sha256
from calumma.platform.training.assignment import Checkpoint

logger = logging.getLogger(__name__)
KIND = "checkpoint"
DAMAGED, SUPERSEDED = "damaged.json", "superseded.json"
_NAME = re.compile(r"step-(\d+)/manifest\.json$")
_FOLDER = re.compile(r"(step-(\d+))/")


def checkpoints_folder(output: str) -> str:
    return storage.join(output, "checkpoints")


def checkpoint_uri(output: str, step: int) -> str:
    return storage.join(checkpoints_folder(output), f"step-{step:08d}")


def published_steps(output: str) -> list[int]:
    """Steps of all checkpoints that have a manifest, newest first."""
    return sorted(
        {int(m[1]) for uri in storage.list_files(checkpoints_folder(output)) if (m := _NAME.search(uri))}, reverse=True
    )


def newest(output: str, accept: Callable[[Manifest], bool] = lambda manifest: True) -> Checkpoint | None:
    """The checkpoint with the most steps among those that `accept` takes and whose files are all there at their size;
    one that is not so is passed over with a warning, and so is one of an owner whose output another had taken."""
    steps = published_steps(output)
    for step, earlier in zip_longest(steps, steps[1:]):
        uri = checkpoint_uri(output, step)
        try:
            manifest = Manifest.find(uri)
            if manifest is None or not accept(manifest):
                continue
            before = Manifest.find(checkpoint_uri(output, earlier)) if earlier is not None else None
            if before is not None and epoch(before) > epoch(manifest):
                logger.warning("the checkpoint after step %d came from a run that had lost the output", step)
                continue
            manifest.verify(uri)
        except ManifestError as error:
            logger.warning("the checkpoint after step %d is not whole, looking for an older one: %s", step, error)
            continue
        return Checkpoint(uri, manifest)
    return None


def publish(uri: str, manifest: Manifest, fence: Fence | None) -> None:
    """Write a checkpoint's manifest, with the number of its owner. Raises OutputTaken, also when a later owner has
    published the same step."""
    if fence is not None:
        fence.check()
        manifest = manifest.model_copy(update={"report": manifest.report | {"epoch": fence.epoch}})
        found = Manifest.find(uri)
        if found is not None and epoch(found) > fence.epoch:
            raise OutputTaken(f"{uri} was written by a later owner of {fence.output}: this run writes no more")
    manifest.write(uri)


def epoch(manifest: Manifest) -> int:
    """The number of the owner who published a checkpoint; 0 when it had no lease."""
    return int(manifest.report.get("epoch", 0))


def find_damage(uri: str, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the content of a published folder's files, by their checksums; empty when nothing is.

    `share` is (rank, world): each worker reads its part of the files.
    """
    rank, world = share
    for entry in manifest.files[rank::world]:
        try:
            if sha256(storage.join(uri, entry.path)) != entry.sha256:
                return f"the content of {entry.path} is not what the manifest says"
        except storage.StorageError as error:
            return str(error)
    return ""


def quarantine(checkpoint: Checkpoint, why: str) -> None:
    """Take a damaged checkpoint out of use: its manifest becomes `damaged.json`, its files stay to be looked at."""
    record = {"why": why, "manifest": checkpoint.manifest.model_dump(mode="json")}
    storage.write_bytes(storage.join(checkpoint.uri, DAMAGED), json.dumps(record).encode())
    storage.delete(storage.join(checkpoint.uri, MANIFEST))
    logger.warning("the checkpoint after step %d is damaged and set aside: %s", checkpoint.step, why)


def set_aside(output: str, step: int, why: str) -> None:
    """Take the checkpoints after a step out of use, for a branch goes on from it: their manifests become
    `superseded.json`; their files stay until retention passes them."""
    for later in published_steps(output):
        if later > step:
            uri = checkpoint_uri(output, later)
            record = {"why": why, "manifest": Manifest.read(uri).model_dump(mode="json")}
            storage.write_bytes(storage.join(uri, SUPERSEDED), json.dumps(record).encode())
            storage.delete(storage.join(uri, MANIFEST))
            logger.warning("the checkpoint after step %d is set aside (%s): %s", later, SUPERSEDED, why)


def newest_step(output: str) -> int:
    """Steps that the newest published checkpoint has; -1 when there is none."""
    return max(published_steps(output), default=-1)


def write_seconds(output: str) -> float:
    """How long writing a checkpoint has taken lately, as the newest one says; 0 when that is not known."""
    steps = published_steps(output)
    manifest = Manifest.find(checkpoint_uri(output, steps[0])) if steps else None
    return float(manifest.report.get("write_seconds", 0.0)) if manifest else 0.0


def retain(output: str, retention: Retention, fence: Fence | None = None) -> list[int]:
    """Delete the checkpoints that need not stay, and what killed uploads before the newest have left; the steps kept.

    One worker calls it, when no upload is under way. Raises OutputTaken.
    """
    steps = published_steps(output)
    kept = set(steps[: retention.last])
    if retention.every is not None:
        kept |= {step for step in steps if step % retention.every == 0}
    if retention.best:
        kept |= set(_best(output, steps)[: retention.best])
    present = {int(m[2]) for uri in storage.list_files(checkpoints_folder(output)) if (m := _FOLDER.search(uri))}
    for step in sorted(present - kept):
        if steps and step < steps[0]:
            if fence is not None:
                fence.check()
            storage.delete(checkpoint_uri(output, step))
    return sorted(kept)


def _best(output: str, steps: Iterable[int]) -> list[int]:
    """Steps by the loss their checkpoint reports, of those that can be compared: by the held-out loss that was measured
    at their own step on the same data as the newest of them; where none has one, by the loss of training on the same
    mixture as the newest."""
    found = [(step, m) for step in sorted(steps, reverse=True) if (m := Manifest.find(checkpoint_uri(output, step)))]
    held_out = [(s, m) for s, m in found if "held_out_loss" in m.report and m.report.get("held_out_step", s) == s]
    if held_out:
        of = held_out[0][1].report.get("held_out_of")
        losses = [(m.report["held_out_loss"], s) for s, m in held_out if m.report.get("held_out_of") == of]
    else:
        trained = [(s, m) for s, m in found if m.report.get("loss") is not None]
        mixture = trained[0][1].specification.get("mixture") if trained else None
        losses = [(m.report["loss"], s) for s, m in trained if m.specification.get("mixture") == mixture]
    return [step for loss, step in sorted((float(loss), step) for loss, step in losses) if math.isfinite(loss)]


def best(output: str) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, measured at its own step; None where none was."""
    for step in _best(output, published_steps(output)):
        uri = checkpoint_uri(output, step)
        manifest = Manifest.read(uri)
        return Checkpoint(uri, manifest) if "held_out_loss" in manifest.report else None
    return None


def local_entry(path: Path, base: str) -> FileEntry:
    """The manifest's entry of a local file below `base`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=digest)
