"""Early stopping counts measurements without a better one, and keeps the weights of the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calumma.platform.training.construction.sources import DirectoryWeights, Wanted
from calumma.platform.training.sections import EarlyStopping
from calumma.platform.training.steps.early import FILE, EarlyStopper


def test_it_stops_after_so_many_measurements_without_a_better_one(tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    stopper = EarlyStopper(EarlyStopping(patience=2, min_delta=0.1), report, str(tmp_path))
    improved = []
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.8, 1.79, 1.75], start=1):
        improved.append(stopper.record(step, loss))
        stopper = EarlyStopper(EarlyStopping(patience=2, min_delta=0.1), dict(report), str(tmp_path))  # resumed
        report = stopper._report
        if stopper.stopped:
            break
    assert improved == [True, True, False, True, False, False]
    assert (stopper.best, report["early"]["step"], step) == (1.8, 4, 6)


def test_the_best_weights_come_back(tmp_path: Path) -> None:
    stopper = EarlyStopper(EarlyStopping(), {}, str(tmp_path))
    stopper.keep({"a": torch.arange(6.0).view(2, 3)})
    found = torch.zeros(3)
    DirectoryWeights(stopper.place, FILE).fill([Wanted("a", 2, found)])
    assert found.tolist() == [2, 3, 4]
