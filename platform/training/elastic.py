"""A stage that survives: groups of workers that come and go, checkpoints that cost a copy, notices, resumption.

`train` is what every worker of every group runs; `Keeper` accompanies its steps. Ray Train restarts and resizes the
group: https://docs.ray.io/en/latest/train/user-guides/fault-tolerance.html
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from calumma.platform import storage
from calumma.platform.config import TrainSpecification
from calumma.platform.data.manifest import FileEntry, Manifest
from calumma.platform.training import checkpoint
from calumma.platform.training.checkpoint import everyone
from calumma.platform.training.watchdog import Action, Notices, Watchdog, followed, notify
from calumma.platform.training.workers import Lifeline, Stopped, TrainingFailed, Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from calumma.platform.training.loop import Assignment

logger = logging.getLogger(__name__)
Published = Callable[[str, dict[str, Any]], None]
_TAG = "state"
_FAILURES = 3  # checkpoints in a row that could not be written; then training ends instead of going on unprotected
_PART_POLL = 0.5  # seconds


def train(config: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs: the loop, from the newest whole checkpoint there is when this group starts."""
    from calumma.platform.training import loop

    assignment: Assignment = config["assignment"]
    resume = checkpoint.resumption(assignment.output, assignment.spec, assignment.inputs)
    try:
        return loop.train(config | {"assignment": replace(assignment, resume=resume)})
    except Stopped as stopped:
        return {"stopped": str(stopped)}


class FirstStep:
    """Where the data of a group that starts now begin: asked by `PlanDataConfig` once its workers are there."""

    def __init__(self, output: str, spec: TrainSpecification, inputs: dict[str, str]) -> None:
        self._output, self._spec, self._inputs = output, spec, inputs

    def __call__(self) -> int:
        found = checkpoint.newest(self._output, checkpoint.continues(self._spec, self._inputs))
        return found.step if found else 0


def lifeline(output: str) -> Lifeline:
    """How the driver and Ray Train's controller reach the workers of the stage that writes to `output`."""
    place = checkpoint.folder(output)
    return Lifeline(partial(checkpoint.newest_step, output), partial(notify, place), partial(followed, place))


class Keeper:
    """Accompanies the steps of one worker: watchdog, notices, preemption, checkpoints. A context manager; leaving it
    without an exception waits until the last checkpoint is published."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        assignment: Assignment,
        worker: Worker,
        published: Published | None = None,
    ) -> None:
        """`published(uri, report)` is called by the first worker, from a background thread, for each checkpoint."""
        self._engine, self._assignment, self._worker, spec = engine, assignment, worker, assignment.spec
        self._checkpoints = checkpoint.folder(assignment.output)
        self._next = assignment.first_step
        self._preemption: Any = None
        earlier = assignment.resume.manifest.report.get("groups", []) if assignment.resume else []
        self.groups = [*earlier, {"step": self._next, "workers": worker.world, "zero_stage": spec.zero_stage}]
        """Every group of workers that had a part in this stage: from which step on, how many workers."""
        self.seconds = 0.0
        """How long training has stood still for checkpoints."""

        def keep_few() -> None:
            checkpoint.retain(assignment.output, spec.resources.keep)

        self._saver = Saver(spec, assignment.inputs, published, keep_few)
        self._watchdog = Watchdog(spec.resources.recovery.hang_seconds, self._keep_stacks)
        self._notices = Notices(self._checkpoints) if worker.leads else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.settle()
                if self._notices is not None:  # training ended before it could be followed
                    self._notices.done()
        finally:
            if self._notices is not None:
                self._notices.close()
            self._watchdog.close()
            self._saver.close()

    def expect(self, step: int) -> None:
        """`step` is about to be taken on its data. Raises RuntimeError when that is not the one whose turn it is: data
        and weights were resumed from different checkpoints."""
        if step != self._next:
            raise RuntimeError(f"the data of step {step} were given to weights after step {self._next}")

    def after(self, done: int, report: dict[str, Any], due: bool) -> None:
        """`done` steps were taken. Every worker calls it after every step with the same arguments.

        A checkpoint is written when it is `due`, or asked for by a notice or a preemption: then it is published on
        return. Raises Stopped when the notice says so, TrainingFailed when checkpoints cannot be written.
        """
        self._next = done
        self._watchdog.beat()
        action, why = self._agreed()
        if not due and action is None:
            return
        began = time.monotonic()
        self._saver.save(
            self._engine, checkpoint.location(self._assignment.output, done), {**report, "groups": self.groups}
        )
        if action is not None:
            self.settle()
            if self._notices is not None:
                self._notices.done()
        self.seconds += time.monotonic() - began
        if action == "stop":
            raise Stopped(
                f"stopped after step {done} ({why}); its checkpoint is "
                f"{checkpoint.location(self._assignment.output, done)}, and the same command goes on from there"
            )
        if action is not None:
            logger.warning("checkpoint after step %d: %s", done, why)

    def beat(self) -> None:
        """There is progress, outside of steps."""
        self._watchdog.beat()

    def settle(self) -> None:
        """Wait until the last checkpoint is published. Every worker calls it; raises TrainingFailed on all of them."""
        try:
            self._saver.settle()
        except storage.StorageError as error:
            raise TrainingFailed(str(error)) from error

    def _agreed(self) -> tuple[Action | None, str]:
        """What this group is to do now: the strongest that any of its workers was told, the same on all."""
        mine: tuple[Action, str] | None = self._notices.found if self._notices is not None else None
        preemption = _preemption()
        if mine is None and preemption is not None and preemption != self._preemption:
            mine = ("checkpoint", "a node is about to be taken away")
        self._preemption = preemption
        levels: dict[Action | None, int] = {None: 0, "checkpoint": 1, "stop": 2}
        told = torch.tensor(levels[mine[0] if mine else None], device=self._engine.device)
        if self._worker.world > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        level = int(told)
        action = next(name for name, number in levels.items() if number == level)
        return action, mine[1] if mine else "another worker was told"

    def _keep_stacks(self, text: str) -> None:
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        name = f"{now}-step-{self._next:08d}-worker-{self._worker.rank:05d}.txt"
        storage.write_bytes(storage.join(self._assignment.output, "stacks", name), text.encode())


class Saver:
    """Checkpoints of this worker and its group: copied to host memory while training waits, written while it goes on.

    Each worker writes its files and then a list of them; when all lists are there, the first worker writes the
    manifest. One checkpoint at a time: the next copy waits for the last writing. A context manager.
    """

    def __init__(
        self,
        spec: TrainSpecification,
        inputs: dict[str, str],
        published: Published | None = None,
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

    def save(self, engine: DeepSpeedEngine, uri: str, report: dict[str, Any]) -> None:
        """Copy the engine's state and start writing it to `uri`; every worker calls it. Raises TrainingFailed when
        several checkpoints in a row could not be written."""
        try:
            self.settle()
        except storage.StorageError as error:
            self._failures += 1
            logger.warning("%s; training goes on with the one before it", error)
            if self._failures >= _FAILURES:
                raise TrainingFailed(f"{self._failures} checkpoints in a row could not be written: {error}") from error
        name = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(name, src=0)
        save = storage.join(uri, name[0])
        report = copy.deepcopy(report) | {
            "world_size": self._world,
            "zero_stage": engine.zero_optimization_stage(),
            "precision": self._spec.precision,
            "folder": name[0],
        }
        scratch = tempfile.TemporaryDirectory(prefix="calumma-checkpoint-")
        states = self._memory.copy(engine, Path(scratch.name))
        self._uri = uri
        self._given_up = threading.Event()
        self._written = self._executor.submit(self._write, states, scratch, save)
        if self._rank == 0:
            self._manifest = self._executor.submit(self._publish, uri, save, report, self._given_up)

    def settle(self) -> None:
        """Wait until the last checkpoint is published; every worker calls it. Raises StorageError on all of them when
        one could not write its part: then the checkpoint does not exist."""
        if self._written is None:
            return
        failed = [told for told in everyone(_told(self._written)) if told]
        self._written = None
        if failed:
            self._given_up.set()
        if not failed and self._rank == 0 and self._manifest is not None:
            failed = [told] if (told := _told(self._manifest)) else []
        failed = [told for told in everyone(failed[0] if failed else "") if told]
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
                entries.append(checkpoint.entry(path, str(path)[: -len(name)]))
                if remote:
                    storage.upload(path, storage.join(save, name))
                    path.unlink()
            for path in sorted(path for path in Path(extra).rglob("*") if path.is_file()):
                entries.append(checkpoint.entry(path, extra))
                storage.upload(path, storage.join(save, entries[-1].path))
        told = [entry.model_dump(mode="json") for entry in entries]
        storage.write_bytes(_part(save, self._rank), json.dumps(told).encode())

    def _publish(self, uri: str, save: str, report: dict[str, Any], given_up: threading.Event) -> None:
        files: list[FileEntry] = []
        for rank in range(self._world):
            while not storage.exists(_part(save, rank)):
                if given_up.wait(_PART_POLL):
                    return
            told = json.loads(storage.read_bytes(_part(save, rank)))
            files += [FileEntry.model_validate(entry) for entry in told]
        named = [entry.model_copy(update={"path": f"{report['folder']}/{entry.path}"}) for entry in files]
        Manifest(
            kind=checkpoint.KIND,
            files=named,
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
    """The state that DeepSpeed saves, copied to host memory that is used again from one checkpoint to the next."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
        """File name -> its content; what DeepSpeed writes by itself (scripts, swapped tensors) is in `folder`."""
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
            engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        finally:
            engine.checkpoint_engine = usual
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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


def _part(save: str, rank: int) -> str:
    return storage.join(save, "parts", f"{rank:05d}.json")


def _told(future: Future[None]) -> str:
    error = future.exception()
    return "" if error is None else f"{type(error).__name__}: {error}"


def _preemption() -> Any:
    """What Ray Train's watcher has told this worker of nodes about to be taken away; None outside of a group.

    The public `ray.train.get_preemption_info` is a barrier with a round trip to an actor: too slow for every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info
    except (RuntimeError, AttributeError):
        return None
