"""Which instrument rose before the loss did: a rule for curves of any training.

A loss has diverged at its first point that is not finite, or that stands `spike` nats a token above the lowest before
it. An instrument has risen at its first point beyond the start whose size is `factor` times the largest of the start,
or that is not finite. How many steps the second comes before the first is what it is worth; how often it rises where
no loss diverges, what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Points = Sequence[Mapping[str, float]]
NAMES = {
    "attention_logit_max": "largest attention logit",
    "query_norm": "norm of queries",
    "key_norm": "norm of keys",
    "activation_rms": "RMS of the residual stream",
    "logit_norm": "norm of the output's logits",
    "log_z": "mean log Z",
    "log_z_max": "largest log Z",
    "gradient_norm": "norm of the gradient",
}


def divergence(points: Points, spike: float) -> int | None:
    """The step at which the loss has diverged; None where it does not."""
    lowest = math.inf
    for point in points:
        loss = point["loss"]
        if not loss < lowest + spike:  # NaN as well
            return int(point["step"])
        lowest = min(lowest, loss)
    return None


def rise(points: Points, name: str, factor: float, after: int) -> int | None:
    """The step at which an instrument has risen over its start, the points up to step `after`; None where it does
    not."""
    start = max((abs(p[name]) for p in points if p["step"] <= after and math.isfinite(p[name])), default=math.inf)
    for point in points:
        if point["step"] > after and not abs(point[name]) <= factor * start:
            return int(point["step"])
    return None


@dataclass(frozen=True)
class Worth:
    """Of one instrument over many trainings."""

    warned: int
    """Diverged trainings in which it rose before the loss, of `diverged`."""
    diverged: int
    false: int
    """Trainings that did not diverge in which it rose, of `sound`."""
    sound: int
    leads: list[int]
    """Steps from its rise to the loss's, of each warning, rising."""

    @property
    def lead(self) -> float | None:
        return median(self.leads) if self.leads else None


def worth(trainings: Sequence[Points], spike: float, factor: float, after: int) -> dict[str, Worth]:
    """Of each instrument that was measured, those that warn most often and earliest first."""
    names = [name for name in NAMES if trainings and name in trainings[0][0]]
    ends = [divergence(points, spike) for points in trainings]
    found = {}
    for name in names:
        rises = [rise(points, name, factor, after) for points in trainings]
        leads = [
            end - at for at, end in zip(rises, ends, strict=True) if at is not None and end is not None and at < end
        ]
        false = sum(at is not None for at, end in zip(rises, ends, strict=True) if end is None)
        diverged = sum(end is not None for end in ends)
        found[name] = Worth(len(leads), diverged, false, len(ends) - diverged, sorted(leads))
    return dict(sorted(found.items(), key=lambda item: (-item[1].warned, -(item[1].lead or 0))))


def first_to_rise(points: Points, spike: float, factor: float, after: int) -> tuple[str, int] | None:
    """The instrument that rose first in a training that diverged, and how many steps before its loss; None where it
    did not diverge, or nothing rose before."""
    end = divergence(points, spike)
    if end is None:
        return None
    rises = {name: rise(points, name, factor, after) for name in NAMES if name in points[0]}
    before = {name: at for name, at in rises.items() if at is not None and at < end}
    if not before:
        return None
    name = min(before, key=lambda one: before[one])
    return name, end - before[name]
