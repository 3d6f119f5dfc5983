"""What accompanies the steps of one worker: watchdog, notices, preemption, checkpoints.

Ray Train restarts and resizes the group: https://docs.ray.io/en/latest/train/user-guides/fault-tolerance.html"""

from __future__ import annotations

import logging
import time
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from calumma.platform import storage
from calumma.platform.specification import Retention
from calumma.platform.storage.lease import OutputTaken
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.checkpoints.saver import OnPublished, Replicated, Saver
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group.entry import keep_stacks
from calumma.platform.training.group.notice import Action, NoticeWatcher
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.standby.copies import Copies
from calumma.platform.training.standby.keeper import keepers_here
from calumma.platform.training.standby.recall import Held

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from calumma.platform.training.assignment import Assignment, ImageAssignment


logger = logging.getLogger(__name__)
_LATE, _TAKEN = 1, 4  # weaker and stronger than every action


class Supervisor:
    """Accompanies the steps of one worker: watchdog, notices, preemption, checkpoints. A context manager; leaving it
    without an exception waits until the last checkpoint is published."""

    def __init__(
        self,
        engine: DeepSpeedEngine | Replicated,
        assignment: Assignment | ImageAssignment,
        worker: Worker,
        published: OnPublished | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """`published(uri, report)` is called by the first worker, from a background thread, for each checkpoint.
        `watchdog`: the one that this worker has already; without it the steps get one of their own."""
        self._engine, self._assignment, self._worker, spec = engine, assignment, worker, assignment.spec
        self._checkpoints = catalog.checkpoints_folder(assignment.output)
        self._next = assignment.first_step
        self._preemption: Any = None
        earlier = assignment.resume.manifest.report.get("groups", []) if assignment.resume else []
        zero_stage = engine.zero_optimization_stage()
        self.groups = [*earlier, {"step": self._next, "workers": worker.world, "zero_stage": zero_stage}]
        """Every group of workers that had a part in this stage: from which step on, how many workers."""
        self._saved = time.monotonic()
        self._deadline: float | None = None
        self.seconds = 0.0
        """How long training has stood still for checkpoints."""

        def keep_few() -> None:
            catalog.retain(assignment.output, keep, fence)

        def prune() -> None:
            catalog.retain(assignment.output, Retention(last=1, best=int(keep.best > 0)), fence)

        keep = spec.resources.keep
        if getattr(spec, "publish", "last") == "best":
            keep = keep.model_copy(update={"best": max(keep.best, 1)})
        fence = assignment.run.fence
        self._saver = Saver(
            spec, assignment.inputs, published, keep_few, fence, prune if keep.when_full == "prune" else None
        )
        self._own_watchdog = watchdog is None
        self._watchdog = watchdog or Watchdog(spec.resources.recovery.hang_seconds, self._save_stacks)
        self._watchdog.place = f"step {self._next:08d}"
        self._notices = NoticeWatcher(self._checkpoints, fence) if worker.is_main else None
        self._copies = self._copies_in_memory()
        self._owed = isinstance(assignment.resume, Held) and self._behind(assignment.first_step)
        """Whether a checkpoint is missing: one that was being written when the last group was lost."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait_until_published()
                if self._notices is not None:  # training ended before it could be followed
                    self._notices.acknowledge("stop")
        finally:
            if self._notices is not None:
                self._notices.close()
            if self._own_watchdog:
                self._watchdog.close()
            self._saver.close()

    def check_step(self, step: int) -> None:
        """`step` is about to be taken on its data. Raises RuntimeError when that is not the one whose turn it is: data
        and weights were resumed from different checkpoints."""
        if step != self._next:
            raise RuntimeError(f"the data of step {step} were given to weights after step {self._next}")

    def after_step(self, done: int, report: dict[str, Any], due: bool) -> None:
        """`done` steps were taken. Every worker calls it after every step with the same arguments.

        A checkpoint is written when it is `due`, by steps or by time, or asked for by a notice or a preemption: then it
        is published on return. Raises Stopped when the notice says so, TrainingFailed when checkpoints cannot be
        written, and OutputTaken when another run has the output.
        """
        self._next = done
        self._watchdog.enter(f"step {done:08d}")
        self._copy(done, report)
        due, self._owed = due or self._owed, False
        self._saver.announce()
        action, why, late = self._agreed_action()
        if not due and not late and action is None:
            return
        began = self._saved = time.monotonic()
        self._saver.save(
            self._engine,
            catalog.checkpoint_uri(self._assignment.output, done),
            {**report, "groups": self.groups, "write_seconds": self._saver.write_seconds},
        )
        if action is not None:
            self.wait_until_published()
            self._tell_of_deadline(done)
            if self._notices is not None:
                self._notices.acknowledge(action)
        self.seconds += time.monotonic() - began
        if action == "stop":
            raise Stopped(
                f"stopped after step {done} ({why}); its checkpoint is "
                f"{catalog.checkpoint_uri(self._assignment.output, done)}, and the same command goes on from there"
            )
        if action is not None:
            logger.warning("checkpoint after step %d: %s", done, why)

    def _copies_in_memory(self) -> Copies | None:
        every = self._assignment.spec.resources.recovery.copy_every
        if every is None or isinstance(self._engine, Replicated):
            return None
        return Copies(partial(keepers_here, self._assignment.run.id), every, self._assignment.first_step)

    def _copy(self, done: int, report: dict[str, Any]) -> None:
        """The state in memory, where that is wanted. What fails there leaves the storage as it is."""
        if self._copies is None:
            return
        stage = self._engine.zero_optimization_stage()
        told = {"world_size": self._worker.world, "zero_stage": stage, "groups": self.groups}
        try:
            self._copies.after_step(self._engine, done, report | told)
        except Exception as error:  # Ray's, the operating system's
            logger.warning(
                "the state is copied in memory no more, only to storage: %s: %s", type(error).__name__, error
            )
            self._copies = None

    def _behind(self, step: int) -> bool:
        """Whether storage has not the checkpoint that was due last before a step. The same on all workers."""
        every = self._assignment.spec.checkpoint_every
        behind = torch.tensor(
            int(self._worker.is_main and catalog.newest_step(self._assignment.output) < step // every * every)
        )
        if self._worker.world > 1:
            behind = behind.to(self._engine.device)
            dist.all_reduce(behind, op=dist.ReduceOp.MAX)
        return bool(behind)

    def beat(self) -> None:
        """There is progress, outside of steps."""
        self._watchdog.beat()

    def wait_until_published(self) -> None:
        """Wait until the last checkpoint is published. Every worker calls it; raises TrainingFailed on all of them."""
        try:
            self._saver.wait_until_published()
        except storage.StorageError as error:
            raise TrainingFailed(str(error)) from error

    def _agreed_action(self) -> tuple[Action | None, str, bool]:
        """What this group is to do now: the strongest that any of its workers was told, the same on all; why; and
        whether it is time for a checkpoint."""
        own: tuple[Action, str] | None = self._notices.pending if self._notices is not None else None
        preemption = _preemption()
        if own is None and preemption is not None and preemption != self._preemption:
            own = ("checkpoint", "a node is about to be taken away")
            self._warn_of_deadline(preemption)
        self._preemption = preemption
        minutes = self._assignment.spec.checkpoint_minutes
        late = self._worker.is_main and minutes is not None and time.monotonic() - self._saved >= 60 * minutes
        levels: dict[Action | None, int] = {None: _LATE if late else 0, "checkpoint": 2, "stop": 3}
        taken = self._notices.taken if self._notices is not None else None
        strongest = torch.tensor(_TAKEN if taken else levels[own[0] if own else None], device=self._engine.device)
        if self._worker.world > 1:
            dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
        level = int(strongest)
        if level == _TAKEN:
            raise taken or OutputTaken(f"{self._assignment.output} belongs to another run now: this one writes no more")
        action = next((name for name, number in levels.items() if name and number == level), None)
        return action, own[1] if own else "another worker was told", level == _LATE

    def _warn_of_deadline(self, preemption: Any) -> None:
        """Before the checkpoint that a preemption asks for: whether there is time for it."""
        self._deadline = preemption.deadline_ms / 1000 if preemption.deadline_ms else None
        if self._deadline is None or not self._worker.is_main:
            return
        left, needed = self._deadline - time.time(), self._saver.write_seconds
        if needed > left:
            told = "a node is taken away in %.0f s, and writing a checkpoint took %.0f s: it may come too late"
            logger.warning(told, left, needed)

    def _tell_of_deadline(self, done: int) -> None:
        """After it: whether it came in time."""
        if self._deadline is None:
            return
        left, self._deadline = self._deadline - time.time(), None
        if self._worker.is_main and left >= 0:
            logger.warning("the checkpoint after step %d was written %.0f s before the node is taken away", done, left)
        elif self._worker.is_main:
            logger.error("the checkpoint after step %d came %.0f s after the node was to be taken away", done, -left)

    def _save_stacks(self, text: str) -> None:
        keep_stacks(storage.join(self._assignment.output, "stacks"), self._watchdog.place, text)


def _preemption() -> Any:
    """What Ray Train's watcher has told this worker of nodes about to be taken away; None outside of a group.

    The public `ray.train.get_preemption_info` is a barrier with a round trip to an actor: too slow for every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info
    except (RuntimeError, AttributeError):
        return None
