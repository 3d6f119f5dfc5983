"""Early stopping: a stage ends when its held-out loss has not fallen for some measurements, with the weights that had
the lowest. These are kept in the output, so that a run that is interrupted goes on with what it knows."""

from __future__ import annotations

from typing import Any

from safetensors.torch import save
from torch import Tensor

from calumma.platform import storage
from calumma.platform.training.sections import EarlyStopping

FOLDER, FILE = "best", "weights.safetensors"


class EarlyStopper:
    """`report["early"]`: {"best": loss, "step": of it, "worse": measurements since, "stopped": …}; it is part of every
    checkpoint, and read from there."""

    def __init__(self, settings: EarlyStopping, report: dict[str, Any], output: str) -> None:
        self._settings, self._report = settings, report
        self.place = storage.join(output, FOLDER)

    @property
    def stopped(self) -> bool:
        return bool(self._report.get("early", {}).get("stopped"))

    @property
    def best(self) -> float | None:
        return self._report.get("early", {}).get("best")

    def record(self, step: int, loss: float) -> bool:
        """Take a measurement in; whether it is the best so far, whose weights are to be kept."""
        early = self._report.get("early") or {"best": None, "step": 0, "worse": 0, "stopped": False}
        improved = early["best"] is None or loss < early["best"] - self._settings.min_delta
        if improved:
            early = {"best": loss, "step": step, "worse": 0, "stopped": False}
        else:
            worse = early["worse"] + 1
            early = early | {"worse": worse, "stopped": worse >= self._settings.patience}
        self._report["early"] = early
        return improved

    def keep(self, weights: dict[str, Tensor]) -> None:
        """Those that are trained, as `FILE` at `place`. Raises StorageError."""
        storage.write_bytes(
            storage.join(self.place, FILE), save({name: weight.contiguous() for name, weight in weights.items()})
        )
