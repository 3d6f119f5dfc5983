"""Checkpoints on a host's own disk, before they are in storage: who starts again there reads them without the network.

A copy is never what counts: a checkpoint exists when its manifest is in storage, and what is missing or damaged here is
read from there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from calumma.platform import storage
from calumma.platform.training.checkpoints import room
from calumma.platform.training.specification import Resumable, TrainSpecification

logger = logging.getLogger(__name__)
KEPT = 2  # checkpoints of an output: the newest, and the one before it until that is published


class NodeLocal:
    """Files of checkpoints below FOLDER/(digest of the output)/(step)-(folder of the save)/."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        """`workers`: of this host, which write about as much each."""
        self._folder, self._workers = folder, workers

    def path(self, uri: str) -> Path:
        """Where the copy of OUTPUT/checkpoints/STEP/SAVE/NAME is."""
        output, step, save, name = uri.rsplit("/", 3)
        digest = hashlib.sha256(output.encode()).hexdigest()[:16]
        return self._folder / digest / f"{step}-{save}" / name

    def make_room(self, uri: str, size: int) -> str:
        """Before `size` bytes of each of this host's workers are written, `uri` among them: what is wrong with the room
        for them, with all copies of the output but the newest deleted where there is too little; empty when nothing
        is. Raises OSError."""
        place, output = str(self._folder), self.path(uri).parent.parent
        self._folder.mkdir(parents=True, exist_ok=True)
        if room.lacking(place, size * self._workers) and output.exists():
            self._keep_newest(output, 1)
        return room.lacking(place, size * self._workers)

    @contextmanager
    def written(self, uri: str) -> Iterator[BinaryIO]:
        """The copy of `uri`, open for writing; afterwards it is whole on the disk, and those of all but the newest
        checkpoints are gone. Raises OSError; then there is no copy."""
        path = self.path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._keep_newest(path.parent.parent, KEPT)

    def read_range(self, uri: str, offset: int, length: int, check: storage.ContentCheck | None = None) -> bytes:
        """As storage.read_range, from the copy where there is one."""
        try:
            with self.path(uri).open("rb") as file:
                file.seek(offset)
                data = file.read(length)
            problem = f"{len(data)} of {length} bytes" if len(data) < length else check(data) if check else None
            if problem is None:
                return data
            logger.warning("the copy %s is damaged (%s): it is read from storage", self.path(uri), problem)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("the copy %s cannot be read (%s): it is read from storage", self.path(uri), error)
        return storage.read_range(uri, offset, length, check)

    def _keep_newest(self, output: Path, kept: int) -> None:
        """Several workers of a host do it at once."""
        found = []
        for folder in output.iterdir():
            with suppress(OSError):
                found.append((folder.stat().st_mtime_ns, folder))
        for _, folder in sorted(found, reverse=True)[kept:]:
            shutil.rmtree(folder, ignore_errors=True)


def node_local(spec: Resumable) -> NodeLocal | None:
    """Where a training keeps copies on its hosts' disks; None where it keeps none, or its state is so small that
    every worker has all of it."""
    folder = spec.resources.recovery.node_local
    if folder is None or not isinstance(spec, TrainSpecification):
        return None
    return NodeLocal(Path(folder), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
