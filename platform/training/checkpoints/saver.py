"""Writing checkpoints while training goes on: a copy to host memory is all it waits for."""

from __future__ import annotations

import copy
import io
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from calumma.platform import storage
from calumma.platform.storage.lease import Fence, OutputTaken
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.training.checkpoints import catalog, layout, room
from calumma.platform.training.checkpoints.agreement import gather_messages
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.checkpoints.node_local import node_local
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.specification import Resumable, TrainSpecification

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


logger = logging.getLogger(__name__)
OnPublished = Callable[[str, dict[str, Any]], None]
REPLICATED_FILE = "state/whole.pt"  # file of a checkpoint whose state is not partitioned
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
_MOST_FAILURES = 3  # checkpoints in a row that could not be written; then training ends instead of going on unprotected


@runtime_checkable
class Replicated(Protocol):
    """What is trained with its whole state on every worker, where DeepSpeed's engine partitions its."""

    @property
    def device(self) -> torch.device: ...

    def zero_optimization_stage(self) -> int: ...

    def whole_state(self) -> dict[str, Any]:
        """Every worker calls it."""
        ...


class Saver:
    """Checkpoints of this worker and its group: copied to host memory while training waits, written while it goes on.

    Each worker writes its files; when all have (`announce`), they tell each other which, and the first writes the
    manifest. One checkpoint at a time: the next copy waits for the last writing. A context manager.
    """

    def __init__(
        self,
        spec: Resumable,
        inputs: dict[str, str],
        published: OnPublished | None = None,
        retain: Callable[[], object] | None = None,
        fence: Fence | None = None,
        prune: Callable[[], object] | None = None,
    ) -> None:
        """`published(uri, report)` and `retain()` are called by the first worker after each checkpoint, from a thread;
        `prune()` before one that there is no room for; `fence`: nothing is published or deleted where the output is
        another run's."""
        self._prune, self._bytes = prune, 0
        self._spec, self._inputs, self._published, self._retain = spec, inputs, published, retain
        self._fence = fence
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._memory, self._copies_here = _HostMemory(), node_local(spec)
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._written: Future[list[FileEntry]] | None = None
        self._manifest: Future[None] | None = None
        self._open = False
        """Whether there is a checkpoint that nobody has waited for."""
        self._problem = ""
        """Why it does not exist, as far as is known."""
        self._failures = 0
        self._uri, self._save, self._device = "", "", torch.device("cpu")
        self._report: dict[str, Any] = {}
        self.write_seconds = 0.0
        """How long the last checkpoint took from its copy to its manifest; known to the first worker."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(self, engine: DeepSpeedEngine | Replicated, uri: str, report: dict[str, Any]) -> None:
        """Copy the engine's state and start writing it to `uri`; every worker calls it. Raises TrainingFailed when
        several checkpoints in a row could not be written."""
        try:
            self.wait_until_published()
        except storage.StorageError as error:
            self._failures += 1
            logger.warning("%s; training goes on with the one before it", error)
            if self._failures >= _MOST_FAILURES:
                raise TrainingFailed(f"{self._failures} checkpoints in a row could not be written: {error}") from error
        self._began, self._uri = time.monotonic(), uri
        name = [uuid.uuid4().hex[:12], self._make_room(uri) if self._rank == 0 else ""]
        dist.broadcast_object_list(name, src=0)
        self._open, self._problem, self._save = True, name[1], ""
        if self._problem:
            return
        save = storage.join(uri, name[0])
        report = copy.deepcopy(report) | {
            "world_size": self._world,
            "zero_stage": engine.zero_optimization_stage(),
            "precision": getattr(self._spec, "precision", "float32"),
            "folder": name[0],
        }
        if isinstance(engine, Replicated):
            files = self._memory.copy_whole(engine)
        else:
            owned = OwnedState(engine)
            report["counters"] = {"step": owned.step} | {name: int(getattr(engine, name)) for name in COUNTERS}
            files = self._memory.copy_owned(owned)
        self._save, self._report, self._device = save, report, engine.device
        self._written = self._executor.submit(self._write, files, save)

    def announce(self) -> None:
        """Let the checkpoint be published once all have written their files; every worker calls it after each step."""
        if self._written is None:
            return
        waiting = torch.tensor(0 if self._written.done() else 1, device=self._device)
        if self._world > 1:
            dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        if not int(waiting):
            self._gather()

    def wait_until_published(self) -> None:
        """Wait until the last checkpoint is published; every worker calls it. Raises StorageError on all of them when
        one could not write its part: then the checkpoint does not exist."""
        if not self._open:
            return
        self._open = False
        if self._written is not None:
            self._gather()
        own = self._problem or (_error_message(self._manifest) if self._manifest is not None else "")
        failed = [message for message in gather_messages(own) if message]
        self._problem, self._manifest = "", None
        if failed:
            self._delete_remains()
            raise storage.StorageError(f"the checkpoint {self._uri} was not written: {failed[0]}")
        self._failures = 0

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _gather(self) -> None:
        """Tell each other what was written; the first worker goes on to publish it. Every worker calls it."""
        assert self._written is not None
        own = (_error_message(self._written), [] if self._written.exception() else self._written.result())
        self._written = None
        parts: list[tuple[str, list[FileEntry]]] = [own] * self._world
        if self._world > 1:
            dist.all_gather_object(parts, own)
        self._problem = next((problem for problem, _ in parts if problem), "")
        if not self._problem and self._rank == 0:
            entries = [entry for _, listed in parts for entry in listed]
            self._manifest = self._executor.submit(self._publish, self._uri, entries, self._report)

    def _make_room(self, uri: str) -> str:
        """What is wrong with the room for as large a checkpoint as the last, with older ones pruned where that is asked
        for; empty when nothing is."""
        problem = room.lacking(uri, self._bytes)
        if not problem or self._prune is None:
            return problem
        try:
            self._prune()
        except (storage.StorageError, OutputTaken) as error:
            logger.warning("no room could be made: %s", error)
        return room.lacking(uri, self._bytes)

    def _delete_remains(self) -> None:
        """What all workers have written of a checkpoint that does not exist: a full disk is to have room again."""
        if self._rank == 0 and self._save:
            try:
                storage.delete(self._save)
            except storage.StorageError as error:
                logger.warning("what was written of the checkpoint %s could not be deleted: %s", self._uri, error)

    def _write(self, files: list[_File], save: str) -> list[FileEntry]:
        copied = bool(files) and storage.is_remote(save) and self._has_room_here(files, save)
        return [self._write_file(file, storage.join(save, file.name), copied) for file in files]

    def _has_room_here(self, files: list[_File], save: str) -> bool:
        """Whether a copy of the files goes to this host's own disk first."""
        if self._copies_here is None:
            return False
        try:
            problem = self._copies_here.make_room(storage.join(save, files[0].name), sum(file.size for file in files))
        except OSError as error:
            self._no_copies(error)
            return False
        if problem:
            logger.warning("no copy of the checkpoint %s is kept on this host: %s", self._uri, problem)
        return not problem

    def _write_file(self, file: _File, uri: str, copied: bool) -> FileEntry:
        if copied and self._copies_here is not None:
            try:
                with self._copies_here.written(uri) as opened:
                    entry = file.write(opened)
            except OSError as error:
                self._no_copies(error)
            else:
                storage.upload(self._copies_here.path(uri), uri)
                return entry
        with _local_file(uri) as opened:
            return file.write(opened)

    def _no_copies(self, error: OSError) -> None:
        logger.warning("no copy of checkpoints is kept on this host any more: %s", error)
        self._copies_here = None

    def _publish(self, uri: str, files: list[FileEntry], report: dict[str, Any]) -> None:
        entries = [entry.model_copy(update={"path": f"{report['folder']}/{entry.path}"}) for entry in files]
        manifest = Manifest(
            kind=catalog.KIND,
            files=entries,
            specification=self._spec.model_dump(mode="json"),
            report=report,
            inputs=self._inputs,
        )
        catalog.publish(uri, manifest, self._fence)
        self.write_seconds, self._bytes = time.monotonic() - self._began, manifest.bytes
        try:
            if self._retain is not None:
                self._retain()
            if self._published is not None:
                self._published(uri, report)
        except OutputTaken:
            raise
        except Exception as error:  # the checkpoint stands
            logger.warning("what follows the checkpoint %s failed: %s", uri, error)


@dataclass(frozen=True)
class _File:
    """A file of a checkpoint, whose content is in host memory."""

    name: str
    size: int
    """Bytes, about."""
    write: Callable[[BinaryIO], FileEntry]


class _HostMemory:
    """The state that is saved, copied to host memory that is used again from one checkpoint to the next."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, ...], Tensor] = {}

    def copy_owned(self, owned: OwnedState) -> list[_File]:
        """What this worker owns of a partitioned state, and on the first worker the index of all. Every worker calls
        it."""
        states, ranges, names = owned.states, owned.ranges, owned.parameters
        header, part = layout.part_layout(ranges, states, names)
        parts: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(part, parts if dist.get_rank() == 0 else None, dst=0)
        copies: dict[str, list[Tensor]] = {state: [] for state in states}
        for fragments in owned.opened():
            for fragment in fragments:
                for state in states:
                    key = (state, fragment.parameter, str(fragment.offset))
                    copies[state].append(self._copied(fragment.states[state], key))
        _finish_copies()
        tensors, name = [tensor for state in states for tensor in copies[state]], layout.part_name(dist.get_rank())
        size = len(header) + part.data_bytes
        files = [_File(name, size, lambda file: layout.write_part(file, name, header, part.piece, tensors))]
        if dist.get_rank() == 0:
            index = layout.index_bytes(parts, states, names)
            files.append(_File(layout.INDEX, len(index), lambda file: _written_bytes(file, layout.INDEX, index)))
        return files

    def copy_whole(self, trained: Replicated) -> list[_File]:
        """A state that every worker has: the first one writes it for all. Every worker calls it."""
        state = trained.whole_state()
        if dist.get_rank() != 0:
            return []
        copied = self._copied_values(state, ())
        _finish_copies()

        def write(file: BinaryIO) -> FileEntry:
            content = io.BytesIO()
            torch.save(copied, content)
            return _written_bytes(file, REPLICATED_FILE, content.getvalue())

        return [_File(REPLICATED_FILE, 0, write)]

    def _copied(self, tensor: Tensor, key: tuple[str, ...]) -> Tensor:
        source = tensor.detach()
        kept = self._tensors.get(key)
        if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
            kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._tensors[key] = kept
        return kept.copy_(source, non_blocking=True)

    def _copied_values(self, value: Any, key: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._copied(value, key)
        if isinstance(value, dict):
            return {name: self._copied_values(inner, (*key, str(name))) for name, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copied_values(inner, (*key, str(n))) for n, inner in enumerate(value))
        return copy.deepcopy(value)


def _finish_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _written_bytes(file: BinaryIO, name: str, data: bytes) -> FileEntry:
    file.write(data)
    return FileEntry.from_bytes(name, data)


@contextmanager
def _local_file(uri: str) -> Iterator[BinaryIO]:
    """A local file to be written: flushed to the disk at the end, and uploaded where its place is not local."""
    with (
        tempfile.TemporaryDirectory(prefix="calumma-checkpoint-")
        if storage.is_remote(uri)
        else nullcontext() as scratch
    ):
        path = Path(scratch, "file") if scratch else storage.local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if scratch:
            storage.upload(path, uri)


def _error_message(future: Future[Any]) -> str:
    error = future.exception()
    return "" if error is None else f"{type(error).__name__}: {error}"


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
    with Saver(spec, inputs) as saver:
        saver.save(engine, uri, report)
        saver.wait_until_published()
