"""Writing checkpoints while training goes on: a copy to host memory is all it waits for."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
import torch.distributed as dist

from calumma.platform import storage
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.checkpoints.resumption import TAG, gather_messages
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.specification import Resumable, TrainSpecification

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


logger = logging.getLogger(__name__)
OnPublished = Callable[[str, dict[str, Any]], None]
REPLICATED_FILE = f"{TAG}/whole.pt"  # file of a checkpoint whose state is not partitioned
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
        scratch = tempfile.TemporaryDirectory(prefix="calumma-checkpoint-")
        states = self._memory.copy(engine, Path(scratch.name))
        self._uri = uri
        self._given_up = threading.Event()
        self._written = self._executor.submit(self._write, states, scratch, save)
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

    def _write(self, states: dict[str, Any], scratch: tempfile.TemporaryDirectory[str], save: str) -> None:
        with scratch as extra:
            entries = []
            for name, state in states.items():
                remote = storage.is_remote(save)
                path = Path(extra, name) if remote else storage.local_path(storage.join(save, name))
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                entries.append(catalog.local_entry(path, str(path)[: -len(name)]))
                if remote:
                    storage.upload(path, storage.join(save, name))
                    path.unlink()
            for path in sorted(path for path in Path(extra).rglob("*") if path.is_file()):
                entries.append(catalog.local_entry(path, extra))
                storage.upload(path, storage.join(save, entries[-1].path))
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


class _HostMemory:
    """The state that is saved, copied to host memory that is used again from one checkpoint to the next."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, engine: DeepSpeedEngine | Replicated, folder: Path) -> dict[str, Any]:
        """File name -> its content; what DeepSpeed writes by itself (scripts, swapped tensors) is in `folder`."""
        states = self._whole(engine) if isinstance(engine, Replicated) else self._partition(engine, folder)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return states

    def _whole(self, trained: Replicated) -> dict[str, Any]:
        """The first worker writes it for all."""
        state = trained.whole_state()
        return {REPLICATED_FILE: self._copied(state, REPLICATED_FILE, [0])} if dist.get_rank() == 0 else {}

    def _partition(self, engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        states: dict[str, Any] = {}
        memory = self

        class ToHost(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                name = Path(path).relative_to(folder).as_posix()
                states[name] = memory._copied(state_dict, name, [0])

            def preserves_storage_sharing(self) -> bool:
                return False  # the copy has no views: DeepSpeed needs not clone them before

        usual = engine.checkpoint_engine
        engine.checkpoint_engine = ToHost()
        try:
            engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        finally:
            engine.checkpoint_engine = usual
        return states

    def _copied(self, value: Any, name: str, number: list[int]) -> Any:
        if isinstance(value, torch.Tensor):
            number[0] += 1
            source = value.detach()
            kept = self._tensors.get((name, number[0]))
            if kept is None or kept.shape != source.shape or kept.dtype != source.dtype:
                kept = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._tensors[(name, number[0])] = kept
            return kept.copy_(source, non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copied(inner, name, number) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._copied(inner, name, number) for inner in value]
        if type(value) is tuple:
            return tuple(self._copied(inner, name, number) for inner in value)
        return copy.deepcopy(value)


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
