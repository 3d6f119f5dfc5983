"""What a training tells MLflow, told to TensorBoard and Weights & Biases too, by their own clients, where the
specification asks for it. MLflow stays what everything is read from; a mirror that fails is left, with a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from calumma.platform.specification import SpecificationError, Tracking

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class Mirror(Protocol):
    name: str

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def log_image(self, image: Image, path: str, step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder of the run's id below the one that is given."""

    name = "TensorBoard"

    def __init__(self, folder: str, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"{folder.rstrip('/')}/{run}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_image(self, image: Image, path: str, step: int) -> None:
        import numpy as np

        picture = np.asarray(image.convert("RGB"))
        self._writer.add_image(path, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the id that MLflow's has: resumed, it goes on. Who logs in, and where, is its client's to know."""

    name = "Weights & Biases"

    def __init__(self, project: str, run: str, config: dict[str, Any], name: str | None) -> None:
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=project, id=run, name=name, config=config, resume="allow", settings=settings
        )  # fmt: skip

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def log_image(self, image: Image, path: str, step: int) -> None:
        self._run.log({path: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


def require_clients(tracking: Tracking) -> None:
    """Raises SpecificationError where a client that is asked for is not installed."""
    from importlib.util import find_spec

    for field, wanted in (("tensorboard", tracking.tensorboard), ("wandb", tracking.wandb)):
        if wanted and find_spec(field) is None:
            raise SpecificationError(
                f"tracking.{field}: the package {field} is not installed here; pip install 'calumma[trackers]' brings "
                "it, on every node"
            )


class Mirrors:
    """All that are asked for. Nothing that goes wrong in one reaches whoever logs."""

    def __init__(self, tracking: Tracking, run: str, config: dict[str, Any], name: str | None) -> None:
        self._mirrors: list[Mirror] = []
        self._step = 0
        asked: list[Callable[[], Mirror]] = []
        if folder := tracking.tensorboard:
            asked.append(lambda: TensorBoard(folder, run))
        if project := tracking.wandb:
            asked.append(lambda: WeightsAndBiases(project, run, config, name))
        for make in asked:
            try:
                self._mirrors.append(make())
            except Exception as error:  # of a client: no network, not logged in, a folder that may not be written to
                logger.warning("training goes on without a mirror of its metrics: %s", error)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._step = max(self._step, step)
        self._each(lambda mirror: mirror.log(metrics, step))

    def log_image(self, image: Image, path: str) -> None:
        self._each(lambda mirror: mirror.log_image(image, path, self._step))

    def close(self) -> None:
        self._each(lambda mirror: mirror.close())

    def _each(self, tell: Callable[[Mirror], None]) -> None:
        for mirror in list(self._mirrors):
            try:
                tell(mirror)
            except Exception as error:
                logger.warning("%s takes nothing any more, training goes on without it: %s", mirror.name, error)
                self._mirrors.remove(mirror)
