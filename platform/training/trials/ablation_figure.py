"""The figure of an ablation: a row a measure, a column a learning rate, a line a variant with a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calumma.platform.training.trials.instruments import divergence
from calumma.platform.training.trials.specification import AblateSpecification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The measure's name, its title, whether the axis is logarithmic.
PANELS = (
    ("loss", "loss, nats a token", False),
    ("attention_logit_max", "largest attention logit", True),
    ("query_norm", "largest mean query norm of a layer", True),
    ("activation_rms", "residual stream after the last layer, RMS", True),
    ("log_z", "mean log Z", False),
    ("gradient_norm", "largest gradient norm", True),
)
Seeds = Sequence[Sequence[Mapping[str, float]]]


def figure(spec: AblateSpecification, curves: Mapping[tuple[str, float], Seeds]) -> Figure:
    """Lines are means over the seeds (geometric on logarithmic axes), bands reach from the smallest to the largest, and
    a cross marks where the loss of a seed has diverged."""
    from matplotlib.figure import Figure

    rates = spec.learning_rates
    drawn = Figure(figsize=(4.6 * len(rates) + 0.6, 2.3 * len(PANELS)), layout="constrained")
    grid = drawn.subplots(len(PANELS), len(rates), squeeze=False, sharex=True, sharey="row")
    for row, (key, title, logarithmic) in enumerate(PANELS):
        for column, rate in enumerate(rates):
            axes = grid[row][column]
            if logarithmic:
                axes.set_yscale("log")
            for number, name in enumerate(spec.variants):
                _draw(axes, curves.get((name, rate), []), key, f"C{number}", name, logarithmic, spec.spike)
            if row == 0:
                axes.set_title(f"learning rate {rate:g}", fontsize=10)
            axes.grid(alpha=0.3)
        grid[row][0].set_ylabel(title, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    drawn.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(spec.variants))
    return drawn


def _draw(axes: Axes, seeds: Seeds, key: str, colour: str, name: str, logarithmic: bool, spike: float) -> None:
    band = across(seeds, key, logarithmic)
    axes.plot([one[0] for one in band], [one[1] for one in band], color=colour, label=name, lw=1.3)
    if len(seeds) > 1:
        steps, _, low, high = zip(*band, strict=True) if band else ((), (), (), ())
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
    for points in seeds if key == "loss" else ():
        end = divergence(points, spike)
        crossed = [point["loss"] for point in points if point["step"] == end and math.isfinite(point["loss"])]
        if end is not None and crossed:
            axes.plot([end], crossed, "x", color=colour, ms=5)


def across(seeds: Seeds, key: str, logarithmic: bool) -> list[tuple[int, float, float, float]]:
    """(step, mean, smallest, largest) over the seeds that have a finite value there."""
    values: dict[int, list[float]] = {}
    for points in seeds:
        for point in points:
            value: Any = point.get(key, math.nan)
            if math.isfinite(value) and (value > 0 or not logarithmic):
                values.setdefault(int(point["step"]), []).append(value)
    mean = _geometric if logarithmic else _arithmetic
    return [(step, mean(found), min(found), max(found)) for step, found in sorted(values.items())]


def _arithmetic(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_arithmetic([math.log(value) for value in values]))
