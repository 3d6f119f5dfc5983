"""How the driver and Ray Train's controller reach the workers of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from calumma.platform.tracking.run import Run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.group.notice import Action, none_pending, notify
from calumma.platform.training.standby import recall

_GRACE = 3.0  # times that writing a checkpoint takes


@dataclass(frozen=True)
class WorkerControl:
    """What a loop that can resume lets others ask of it. All are called in other processes: they must be picklable."""

    newest_step: Callable[[], int]
    """Steps of its newest checkpoint, or copy in memory."""
    notify: Callable[[Action, str], None]
    """Ask for a checkpoint, or for one and to stop, with the reason."""
    acknowledged: Callable[[], bool]
    """Whether nothing that was asked for is left to do."""
    write_seconds: Callable[[], float] = lambda: 0.0
    """How long writing a checkpoint has taken lately."""

    def grace(self, least: float) -> float:
        """Seconds to wait for a checkpoint: it may have to wait for the one before it, and for a step."""
        try:
            return max(least, _GRACE * self.write_seconds())
        except OSError:  # storage is away
            return least


def _newest_step(output: str, copied: str | None) -> int:
    return max(catalog.newest_step(output), recall.newest_step(copied) if copied else -1)


def worker_control(output: str, run: Run | None = None, copied: bool = False) -> WorkerControl:
    """How the driver of a run and Ray Train's controller reach the workers of the stage that writes to `output`."""
    checkpoints, owner = catalog.checkpoints_folder(output), run.fence.token if run and run.fence else ""
    return WorkerControl(
        partial(_newest_step, output, run.id if copied and run else None),
        partial(notify, checkpoints, owner),
        partial(none_pending, checkpoints, owner),
        partial(catalog.write_seconds, output),
    )
