"""How the driver and Ray Train's controller reach the workers of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from calumma.platform.training.checkpoints import catalog, resumption
from calumma.platform.training.group.notice import Action, none_pending, notify
from calumma.platform.training.specification import TrainSpecification


@dataclass(frozen=True)
class WorkerControl:
    """What a loop that can resume lets others ask of it. All are called in other processes: they must be picklable."""

    newest_step: Callable[[], int]
    """Steps of its newest checkpoint."""
    notify: Callable[[Action, str], None]
    """Ask for a checkpoint, or for one and to stop, with the reason."""
    acknowledged: Callable[[], bool]
    """Whether nothing that was asked for is left to do."""


class FirstStep:
    """Where the data of a group that starts now begin: asked by `PlanDataConfig` once its workers are there."""

    def __init__(self, output: str, spec: TrainSpecification, inputs: dict[str, str]) -> None:
        self._output, self._spec, self._inputs = output, spec, inputs

    def __call__(self) -> int:
        checkpoint = catalog.newest(self._output, resumption.made_by(self._spec, self._inputs))
        return checkpoint.step if checkpoint else 0


def worker_control(output: str) -> WorkerControl:
    """How the driver and Ray Train's controller reach the workers of the stage that writes to `output`."""
    checkpoints = catalog.checkpoints_folder(output)
    return WorkerControl(
        partial(catalog.newest_step, output), partial(notify, checkpoints), partial(none_pending, checkpoints)
    )
