"""A group of Ray Train workers that runs one loop: started, watched and stopped from the driver."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import Recovery, Resources
from calumma.platform.tracking.run import Run
from calumma.platform.training.errors import Stopped, TrainingFailed
from calumma.platform.training.group import console, entry
from calumma.platform.training.group.control import WorkerControl
from calumma.platform.training.group.policies import (
    checkpoint_before_resizing,
    failure_policy,
    scaling_policy,
    wait_until,
)
from calumma.platform.training.standby.handed_on import ended_by_failure, handed_on_callback, taken
from calumma.platform.training.standby.processes import Standby, standby_callback

if TYPE_CHECKING:
    from calumma.platform.streaming.tensors import PlanData


logger = logging.getLogger(__name__)


# How long a group waits for its place. Ray Train's own limit, one minute, is short for a starved machine; a group that
# may have another size looks again much sooner what size there is place for.
START_TIMEOUT, ELASTIC_START_TIMEOUT = "900", "30"  # seconds


@dataclass
class Signals:
    """SIGINT and SIGTERM that the driver received while workers ran. `finished`: the workers have ended."""

    received: list[int] = field(default_factory=list)
    finished: threading.Event = field(default_factory=threading.Event)

    def exit_exception(self) -> BaseException:
        """The exception that the driver ends with, by the first signal."""
        first = self.received[0]
        return KeyboardInterrupt() if first == signal.SIGINT else SystemExit(128 + first)


def fit(
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    workers: int | tuple[int, int],
    resources: Resources,
    name: str,
    run: Run,
    steps: int,
    progress: Progress,
    data: PlanData | None = None,
    control: WorkerControl | None = None,
    stacks: str,
    copies: bool = False,
    multiple: int = 1,
    rehearsal: Callable[[], object] | None = None,
) -> Any:
    """Run `loop(config)` on workers joined by torch.distributed; what the loop returned on rank 0.

    A worker where nothing goes on for `recovery.hang_seconds`, from its first import to its end, is ended; its stack
    traces go to the folder `stacks`.
    `workers` is their number or a range, in which it follows the size of the cluster, in multiples of `multiple`.
    With a `control`, workers that fail are started again, and Ctrl-C and SIGTERM let them write a checkpoint first.
    `copies`: the loop can go on from copies of its state in memory. `rehearsal`: what a spare process does to be warm.
    Progress follows the run's metrics `step` and `loss`. Raises TrainingFailed, KeyboardInterrupt on Ctrl-C and
    SystemExit on SIGTERM, and in all cases leaves no worker at work behind: within `handing_on`, after an end without
    an error, their processes, which wait for the next training.
    """
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    elastic, signals = isinstance(workers, tuple), Signals()
    resizing: dict[str, Any] = {}
    if elastic:
        resizing["elastic_resize_monitor_interval_s"] = resources.recovery.resize_seconds
    recovery = resources.recovery
    callbacks = [checkpoint_before_resizing(control, recovery)] if control and elastic else []
    copied, spares = copies and recovery.copy_every is not None, recovery.spares and not resources.gpus_per_worker
    stands_by = control is not None and (copied or spares)
    if stands_by:
        standby = Standby(entry.packed((loop, rehearsal)) if spares else None, run.id if copied else None)
        callbacks.append(standby_callback(standby))
    ready: list[Any] = []
    if not stands_by and isinstance(workers, int) and not resources.gpus_per_worker:
        ready = taken(workers, entry.packed((loop, None)))
    if ready:
        callbacks.append(handed_on_callback(ready, recovery.hang_seconds))
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="calumma-train-") as folder:  # our own checkpoints go to our own storage
        trainer = _trainer_class(control, recovery, signals, multiple, data)(
            entry.watched(loop, recovery.hang_seconds, stacks, used_again=stands_by and spares),
            train_loop_config={"payload": entry.packed(config)},
            torch_config=TorchConfig(
                backend="nccl" if resources.gpus_per_worker else "gloo",
                timeout_s=resources.recovery.collective_seconds,
            ),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=per_worker,
                accelerator_type=resources.accelerator,
                **resizing,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=resources.recovery.restarts if control else 0),
                callbacks=callbacks,
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        patience = ELASTIC_START_TIMEOUT if elastic else START_TIMEOUT
        with (
            console.progress_from_metrics(run, name, steps, progress),
            _interruptible(signals),
            _ray_train_settings(patience, look_seconds(resources.max_workers) if stands_by else None),
            ended_by_failure(ready),
        ):
            try:
                result = trainer.fit()
            except TrainingFailedError as error:
                raise TrainingFailed(_first_cause(error)) from error
    if result.return_value is None:
        raise TrainingFailed("training ended before its last step, and its workers did not say why")
    if isinstance(result.return_value, dict) and "stopped" in result.return_value:
        stopped = Stopped(result.return_value["stopped"])
        if not signals.received:
            raise stopped
        logger.warning("%s", stopped)
    if signals.received:  # also where training was over before it could be stopped
        raise signals.exit_exception()
    return result.return_value


@contextmanager
def _ray_train_settings(start_timeout: str, look: float | None) -> Iterator[None]:
    """Ray Train's settings for the length of a block; what the user has set himself stays."""
    settings = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": start_timeout}
    if look is not None:
        settings["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = f"{look:g}"
    own = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def look_seconds(workers: int) -> float:
    """Seconds between two looks of the controller at its workers, each of which is a call to every one: more than
    Ray's 2 s would not be, and less for few."""
    return min(2.0, 0.1 + workers / 500)


def _trainer_class(
    control: WorkerControl | None, recovery: Recovery, signals: Signals, multiple: int, data: PlanData | None
) -> Any:
    """Ray's TorchTrainer with our failure policy and signals, where there is a control; with the plan's data; and
    without the placement-group cleaner where there is no dashboard to ask.

    The cleaner is a process that asks the dashboard's state API every second whether the controller lives, and warns
    each time it cannot. A cluster without dashboard is an embedded one, which ends with its driver anyway. Ray 2.60
    has no setting for it (ray/train/v2/_internal/callbacks/placement_group_callback.py), nor for the other two.
    """
    import ray
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from calumma.platform.streaming.tensors import plan_callback

    cleaner = bool(ray._private.worker.get_dashboard_url())

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            left_out = {"DatasetsCallback"} | (set() if cleaner else {"PlacementGroupCleanerCallback"})
            callbacks = [c for c in super()._create_default_callbacks() if type(c).__name__ not in left_out]
            return callbacks if data is None else [*callbacks, plan_callback(data)]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if control is not None:
                arguments["failure_policy"] = failure_policy(self.run_config.failure_config, control.newest_step)
            if isinstance(self.scaling_config.num_workers, tuple):
                arguments["scaling_policy"] = scaling_policy(self.scaling_config, multiple)
            return super()._initialize_and_run_controller(**arguments)

        def _register_sigint_handler(self, controller: Any) -> None:
            if control is None:
                super()._register_sigint_handler(controller)
            else:
                _stop_on_signals(control, recovery.stop_seconds, lambda: ray.kill(controller), signals)

    return Trainer


def _stop_on_signals(control: WorkerControl, least: float, abort: Callable[[], None], signals: Signals) -> None:
    """The first Ctrl-C or SIGTERM asks the workers for a checkpoint and to end, the second ends them, and so do
    `least` seconds without an answer, or more where writing a checkpoint takes longer. `_interruptible` restores
    the handlers."""

    def on_signal(number: int, frame: Any) -> None:
        signals.received.append(number)
        if len(signals.received) > 1:
            abort()
            raise signals.exit_exception()
        name = signal.Signals(number).name
        logger.warning("%s: the workers write a checkpoint and end; again to end them without", name)
        threading.Thread(target=request_checkpoint, args=(name,), name="stop", daemon=True).start()

    def request_checkpoint(name: str) -> None:
        try:
            control.notify("stop", name)
            grace = control.grace(least)
            if not wait_until(grace, lambda: signals.finished.is_set() or control.acknowledged()):
                logger.warning("the workers have not answered in %g s: they are ended without a checkpoint", grace)
                abort()
        except OSError as error:
            logger.warning("the workers cannot be asked for a checkpoint, and are ended: %s", error)
            abort()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)


@contextmanager
def _interruptible(signals: Signals) -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt here, SIGTERM a SystemExit. Ray Train's handler aborts the workers and then leaves
    by SystemExit, with 0 or, from within Ray's own code, 1; and it stays installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (Exception, SystemExit) as error:
        if signals.received:
            raise signals.exit_exception() from error
        if isinstance(error, SystemExit) and error.code in (0, 1):
            raise KeyboardInterrupt from error
        raise
    finally:
        signals.finished.set()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _first_cause(error: Any) -> str:
    """What went wrong on the first worker that failed, in its own words."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return str(error)
    rank = min(failures)
    cause = getattr(failures[rank], "_base_exc", failures[rank])
    if type(cause).__module__.startswith("calumma."):
        return str(cause)  # written for the user
    return f"training failed on worker {rank}, {type(cause).__name__}: {cause}\n{error}"
