"""What a ladder found, as its figure and its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calumma.platform.reports.templates import data_url, render
from calumma.platform.training.trials.law import Law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATE = "platform/training/trials/ladder.html.j2"
Found = Mapping[str, Any]  # of `ladder.findings`


def figure(found: Found) -> Figure:
    """Loss against compute with the law of the smaller sizes and what it said of the largest; and the sweep."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12 if found["sweep"] else 7.5, 4.8), layout="constrained")
    first, *others = drawn.subplots(1, 2 if found["sweep"] else 1, squeeze=False, width_ratios=_widths(found))[0]
    _losses(first, found)
    for axes in others:
        _sweep(axes, found)
    return drawn


def _widths(found: Found) -> list[float]:
    return [1.7, 1.0] if found["sweep"] else [1.0]


def _losses(axes: Axes, found: Found) -> None:
    smaller, whole = (_law(found[name]) for name in ("law", "law_of_all"))
    sizes = found["sizes"]
    for number, size in enumerate(sizes):
        points = sorted(mean_points(found, number))
        tokens = np.geomspace(points[0][0], points[-1][0], 50)
        axes.plot(
            tokens * size["flops_per_token"], smaller.loss(size["parameters"], tokens), f"C{number}", lw=1, alpha=0.6
        )
        seen = "" if number < len(sizes) - 1 else ", not in the fit"
        axes.plot(
            [at * size["flops_per_token"] for at, _ in points],
            [loss for _, loss in points],
            f"C{number}o",
            ms=5,
            label=f"{millions(size['parameters'])}, width {size['width']}{seen}",
        )
    _whiskers(axes, found["checks"], sizes[-1]["flops_per_token"], f"C{len(sizes) - 1}", "its prediction")
    following = found["next"]
    _whiskers(
        axes, [following], following["flops_per_token"], f"C{len(sizes)}", f"next: {millions(following['parameters'])}"
    )
    computes = [one["compute"] for one in found["trainings"]] + [following["compute"]]
    axis = np.geomspace(min(computes), max(computes) * 1.2, 60)
    each = sizes[-1]["flops_per_token"] / sizes[-1]["parameters"]
    frontier = [whole.loss(*whole.best(compute, lambda n: each * n)) for compute in axis]
    axes.plot(axis, frontier, "k--", lw=1, alpha=0.7, label="best for its compute, by the law of all")
    axes.set_xscale("log")
    axes.set_xlabel("compute, FLOP")
    axes.set_ylabel("held-out loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _whiskers(axes: Axes, of: Iterable[Mapping[str, Any]], flops: float, colour: str, label: str) -> None:
    for number, one in enumerate(of):
        value, low, high = one["predicted"]
        ends = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        settings: dict[str, Any] = {"fmt": "D", "mfc": "white", "color": colour, "ms": 6, "capsize": 3}
        axes.errorbar([one["tokens"] * flops], [value], yerr=ends, label=None if number else label, **settings)


def _sweep(axes: Axes, found: Found) -> None:
    for number, size in enumerate(found["sizes"]):
        points = sorted((one["learning_rate"], one["loss"]) for one in found["sweep"] if one["size"] == number)
        if points:
            axes.plot(*zip(*points, strict=True), f"C{number}o-", ms=4, label=millions(size["parameters"]))
    axes.axvline(found["learning_rate"], color="k", ls=":", lw=1, label=f"taken: {found['learning_rate']:.3g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate of the first size (muP)")
    axes.set_ylabel("training loss after a short training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def mean_points(found: Found, size: int) -> list[tuple[int, float]]:
    """(tokens, loss) of a size, means over its seeds."""
    losses: dict[int, list[float]] = {}
    for one in found["trainings"]:
        if one["size"] == size:
            losses.setdefault(one["tokens"], []).append(one["loss"])
    return [(tokens, sum(values) / len(values)) for tokens, values in losses.items()]


def _law(numbers: Mapping[str, Sequence[float]]) -> Law:
    return Law(**{name: value for name, (value, _, _) in numbers.items()})


def page(name: str, found: Found, picture: bytes) -> str:
    """The whole page."""
    points = [(size, sorted(mean_points(found, number))) for number, size in enumerate(found["sizes"])]
    return render(
        TEMPLATE,
        name=name,
        found=found,
        points=points,
        picture=data_url(picture),
        millions=millions,
        formula=formula(found["law"]),
        formula_of_all=formula(found["law_of_all"]),
    )


def formula(numbers: Mapping[str, Sequence[float]]) -> str:
    """The law in words."""
    e, a, alpha, b, beta = (numbers[name][0] for name in ("E", "A", "alpha", "B", "beta"))
    return f"L = {e:.3f} + {a:.3g} / N^{alpha:.3f} + {b:.3g} / D^{beta:.3f}"


def millions(parameters: float) -> str:
    return f"{parameters / 1e6:.1f} M"
