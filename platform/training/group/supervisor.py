"""What accompanies the steps of one worker: watchdog, notices, preemption, checkpoints.

Ray Train restarts and resizes the group: https://docs.ray.io/en/latest/train/user-guides/fault-tolerance.html"""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from calumma.platform import storage
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.checkpoints.saver import OnPublished, Replicated, Saver
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group.entry import keep_stacks
from calumma.platform.training.group.notice import Action, NoticeWatcher
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from calumma.platform.training.assignment import Assignment, ImageAssignment


logger = logging.getLogger(__name__)


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
        self.seconds = 0.0
        """How long training has stood still for checkpoints."""

        def keep_few() -> None:
            catalog.retain(assignment.output, spec.resources.keep)

        self._saver = Saver(spec, assignment.inputs, published, keep_few)
        self._own_watchdog = watchdog is None
        self._watchdog = watchdog or Watchdog(spec.resources.recovery.hang_seconds, self._save_stacks)
        self._watchdog.place = f"step {self._next:08d}"
        self._notices = NoticeWatcher(self._checkpoints) if worker.is_main else None

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

        A checkpoint is written when it is `due`, or asked for by a notice or a preemption: then it is published on
        return. Raises Stopped when the notice says so, TrainingFailed when checkpoints cannot be written.
        """
        self._next = done
        self._watchdog.enter(f"step {done:08d}")
        action, why = self._agreed_action()
        if not due and action is None:
            return
        began = time.monotonic()
        self._saver.save(
            self._engine, catalog.checkpoint_uri(self._assignment.output, done), {**report, "groups": self.groups}
        )
        if action is not None:
            self.wait_until_published()
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

    def beat(self) -> None:
        """There is progress, outside of steps."""
        self._watchdog.beat()

    def wait_until_published(self) -> None:
        """Wait until the last checkpoint is published. Every worker calls it; raises TrainingFailed on all of them."""
        try:
            self._saver.wait_until_published()
        except storage.StorageError as error:
            raise TrainingFailed(str(error)) from error

    def _agreed_action(self) -> tuple[Action | None, str]:
        """What this group is to do now: the strongest that any of its workers was told, the same on all."""
        own: tuple[Action, str] | None = self._notices.pending if self._notices is not None else None
        preemption = _preemption()
        if own is None and preemption is not None and preemption != self._preemption:
            own = ("checkpoint", "a node is about to be taken away")
        self._preemption = preemption
        levels: dict[Action | None, int] = {None: 0, "checkpoint": 1, "stop": 2}
        strongest = torch.tensor(levels[own[0] if own else None], device=self._engine.device)
        if self._worker.world > 1:
            dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
        level = int(strongest)
        action = next(name for name, number in levels.items() if number == level)
        return action, own[1] if own else "another worker was told"

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
