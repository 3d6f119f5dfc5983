"""Writing checkpoints while training goes on: a copy to host memory is all it waits for."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import tempfile
import threading
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
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.training.checkpoints import catalog, layout
from calumma.platform.training.checkpoints.agreement import gather_messages
from calumma.platform.training.checkpoints.fragments import OwnedState
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.specification import Resumable, TrainSpecification

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


logger = logging.getLogger(__name__)
OnPublished = Callable[[str, dict[str, Any]], None]
REPLICATED_FILE = "state/whole.pt"  # file of a checkpoint whose state is not partitioned
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
_MOST_FAILURES = 3  # checkpoints in a row that could not be written; then training ends instead of going on unprotected
_PART_POLL = 0.5  # seconds


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

    Each worker writes its files and then a list of them; when all lists are there, the first worker writes the
    manifest. One checkpoint at a time: the next copy waits for the last writing. A context manager.
    """

    def __init__(
        self,
        spec: Resumable,
        inputs: dict[str, str],
        published: OnPublished | None = None,
        retain: Callable[[], object] | None = None,
    ) -> None:
        self._spec, self._inputs, self._published, self._retain = spec, inputs, published, retain
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._memory = _HostMemory()
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._manifest: Future[None] | None = None
        self._given_up = threading.Event()
        self._failures = 0
        self._uri = ""

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
        name = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(name, src=0)
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
        self._uri = uri
        self._given_up = threading.Event()
        self._written = self._executor.submit(self._write, files, save)
        if self._rank == 0:
            self._manifest = self._executor.submit(self._publish, uri, save, report, self._given_up)

    def wait_until_published(self) -> None:
        """Wait until the last checkpoint is published; every worker calls it. Raises StorageError on all of them when
        one could not write its part: then the checkpoint does not exist."""
        if self._written is None:
            return
        failed = [message for message in gather_messages(_error_message(self._written)) if message]
        self._written = None
        if failed:
            self._given_up.set()
        if not failed and self._rank == 0 and self._manifest is not None:
            failed = [message] if (message := _error_message(self._manifest)) else []
        failed = [message for message in gather_messages(failed[0] if failed else "") if message]
        if failed:
            raise storage.StorageError(f"the checkpoint {self._uri} was not written: {failed[0]}")
        self._failures = 0

    def close(self) -> None:
        self._given_up.set()
        self._executor.shutdown(wait=True)

    def _write(self, files: list[_File], save: str) -> None:
        entries = []
        for file in files:
            uri = storage.join(save, file.name)
            with _local_file(uri) as opened:
                entries.append(file.write(opened))
        listing = [entry.model_dump(mode="json") for entry in entries]
        storage.write_bytes(_part_uri(save, self._rank), json.dumps(listing).encode())

    def _publish(self, uri: str, save: str, report: dict[str, Any], given_up: threading.Event) -> None:
        files: list[FileEntry] = []
        for rank in range(self._world):
            while not storage.exists(_part_uri(save, rank)):
                if given_up.wait(_PART_POLL):
                    return
            listing = json.loads(storage.read_bytes(_part_uri(save, rank)))
            files += [FileEntry.model_validate(entry) for entry in listing]
        entries = [entry.model_copy(update={"path": f"{report['folder']}/{entry.path}"}) for entry in files]
        Manifest(
            kind=catalog.KIND,
            files=entries,
            specification=self._spec.model_dump(mode="json"),
            report=report,
            inputs=self._inputs,
        ).write(uri)
        try:
            if self._retain is not None:
                self._retain()
            if self._published is not None:
                self._published(uri, report)
        except Exception as error:  # the checkpoint stands
            logger.warning("what follows the checkpoint %s failed: %s", uri, error)


@dataclass(frozen=True)
class _File:
    """A file of a checkpoint, whose content is in host memory."""

    name: str
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
        files = [_File(name, lambda file: layout.write_part(file, name, header, part.piece, tensors))]
        if dist.get_rank() == 0:
            index = layout.index_bytes(parts, states, names)
            files.append(_File(layout.INDEX, lambda file: _written_bytes(file, layout.INDEX, index)))
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

        return [_File(REPLICATED_FILE, write)]

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


def _part_uri(save: str, rank: int) -> str:
    return storage.join(save, "parts", f"{rank:05d}.json")


def _error_message(future: Future[None]) -> str:
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
