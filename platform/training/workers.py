"""A group of Ray Train workers that runs one loop: started, watched and stopped from the driver.

The loop's first call in a worker is `join()`, which gives it its rank, its device and its share of the machine's cores.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calumma.platform.config import JobSpecification, Resources
from calumma.platform.progress import Progress
from calumma.platform.tracking import Run

if TYPE_CHECKING:
    import torch
    from ray.train import DataConfig

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=JobSpecification)

# Importing torch and DeepSpeed takes a starved machine up to a minute a process; Ray Train's own limit is one minute.
START_TIMEOUT = "900"  # seconds
POLL = 2.0  # seconds between two looks at the run's newest metrics


class TrainingFailed(RuntimeError):
    """Training stopped; the message holds the first worker's error, the cause all of them."""


@dataclass(frozen=True)
class Worker:
    """What a worker knows about itself."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


def join() -> Worker:
    """To be called first in a worker's loop: settles libraries, threads and device."""
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    # DeepSpeed and MLflow tell on every worker what nobody asked for; warnings stay.
    for name in ("DeepSpeed", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for one, and may find a driver without a device
        torch.set_num_threads(max(1, _cores() // context.get_local_world_size()))
    return Worker(context.get_world_rank(), context.get_world_size(), device)


def absolute(spec: S) -> S:
    """The specification with its local storage root made absolute: workers stand in other working directories."""
    if "://" in spec.storage:
        return spec
    return spec.model_copy(update={"storage": str(Path(spec.storage).expanduser().absolute())})


def fit(
    loop: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    workers: int,
    resources: Resources,
    name: str,
    run: Run,
    steps: int,
    progress: Progress,
    data: DataConfig | None = None,
    datasets: dict[str, Any] | None = None,
) -> Any:
    """Run `loop(config)` on `workers` workers joined by torch.distributed; what the loop returned on rank 0.

    Progress follows the run's metrics `step` and `loss`. Raises TrainingFailed, or KeyboardInterrupt on Ctrl-C, and in
    both cases leaves no worker behind.
    """
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT)
    per_worker = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    with tempfile.TemporaryDirectory(prefix="calumma-train-") as folder:  # our own checkpoints go to our own storage
        trainer = _trainer_class()(
            loop,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
            dataset_config=data,
            datasets=datasets,
        )
        with _following(run, steps, progress), _interruptible():
            try:
                result = trainer.fit()
            except TrainingFailedError as error:
                raise TrainingFailed(_first_cause(error)) from error
    if result.return_value is None:
        raise TrainingFailed("training ended before its last step, and its workers did not say why")
    return result.return_value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _trainer_class() -> Any:
    """Ray's TorchTrainer, without the placement-group cleaner where there is no dashboard to ask.

    The cleaner is a process that asks the dashboard's state API every second whether the controller lives, and warns
    each time it cannot. A cluster without dashboard is an embedded one, which ends with its driver anyway. Ray 2.60
    has no setting for it (ray/train/v2/_internal/callbacks/placement_group_callback.py).
    """
    import ray
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    if ray._private.worker.get_dashboard_url():
        return TorchTrainer

    class WithoutCleaner(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return WithoutCleaner


@contextmanager
def _following(run: Run, steps: int, progress: Progress) -> Iterator[None]:
    """Report the run's newest step from a thread, by MLflow's public interface, so that it works from anywhere."""
    stop = threading.Event()
    progress(0, steps, "starting the workers")

    def follow() -> None:
        shown = -1.0
        while not stop.wait(POLL):
            try:
                latest = run.latest()
            except Exception as error:
                logger.debug("no news from MLflow: %s", error)
                continue
            if (step := latest.get("step", -1.0)) > shown:
                shown = step
                loss = latest.get("loss")
                progress(step, steps, "" if loss is None else f"loss {loss:.3f}")

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt here. Ray Train's handler aborts the workers and then leaves by SystemExit, with 0
    or, from within Ray's own code, 1; and it stays installed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if error.code not in (0, 1):  # SIGTERM, say: not Ray Train's doing
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)


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
