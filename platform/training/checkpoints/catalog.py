"""Checkpoints in storage: which there are, which are whole, which stay.

OUTPUT/checkpoints/step-00000100/manifest.json (last) and the files of every worker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from calumma.platform import storage
from calumma.platform.specification import Retention
from calumma.platform.storage.manifest import MANIFEST, FileEntry, Manifest, ManifestError, sha256
from calumma.platform.training.assignment import Checkpoint

logger = logging.getLogger(__name__)
KIND = "checkpoint"
DAMAGED = "damaged.json"
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
    one that is not so is passed over with a warning."""
    for step in published_steps(output):
        uri = checkpoint_uri(output, step)
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


def find_damage(checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> str:
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


def quarantine(checkpoint: Checkpoint, why: str) -> None:
    """Take a damaged checkpoint out of use: its manifest becomes `damaged.json`, its files stay to be looked at."""
    record = {"why": why, "manifest": checkpoint.manifest.model_dump(mode="json")}
    storage.write_bytes(storage.join(checkpoint.uri, DAMAGED), json.dumps(record).encode())
    storage.delete(storage.join(checkpoint.uri, MANIFEST))
    logger.warning("the checkpoint after step %d is damaged and set aside: %s", checkpoint.step, why)


def newest_step(output: str) -> int:
    """Steps that the newest published checkpoint has; -1 when there is none."""
    return max(published_steps(output), default=-1)


def retain(output: str, retention: Retention) -> list[int]:
    """Delete the checkpoints that need not stay, and what killed uploads before the newest have left; the steps kept.

    One worker calls it, when no upload is under way.
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
            storage.delete(checkpoint_uri(output, step))
    return sorted(kept)


def _best(output: str, steps: Iterable[int]) -> list[int]:
    """Steps by the loss their checkpoint reports, held-out where there is one; those without a loss are left out."""
    losses: list[tuple[float, int]] = []
    for step in steps:
        manifest = Manifest.find(checkpoint_uri(output, step))
        loss = None if manifest is None else manifest.report.get("held_out_loss", manifest.report.get("loss"))
        if loss is not None:
            losses.append((float(loss), step))
    return [step for _, step in sorted(losses)]


def local_entry(path: Path, base: str) -> FileEntry:
    """The manifest's entry of a local file below `base`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=digest)
