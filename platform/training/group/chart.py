"""The groups of workers that had a part in a training, and a picture of their sizes over its steps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from calumma.platform.training.assignment import Assignment
from calumma.platform.training.checkpoints import catalog, identity
from calumma.platform.training.specification import Resumable

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from PIL.Image import Image

    from calumma.platform.training.assignment import ImageAssignment


def worker_range(spec: Resumable, number: int) -> int | tuple[int, int]:
    """How many workers to start: `number`, or the range that was asked for."""
    least, most = spec.resources.min_workers, spec.resources.max_workers
    return (least, most) if least < most else number


def worker_groups(assignment: Assignment | ImageAssignment) -> list[dict[str, Any]]:
    """The groups of workers that had a part in a training; a picture of them is logged when there were several."""
    found = catalog.newest(assignment.output, identity.made_by(assignment.spec, assignment.inputs))
    groups: list[dict[str, Any]] = found.manifest.report.get("groups", []) if found else []
    if len(groups) > 1:
        try:
            assignment.run.log_image(group_sizes_chart(groups, assignment.spec.steps), "workers.png")
        except Exception as error:  # MLflow may be away
            logger.warning("the chart of workers over steps was not logged: %s", error)
    return groups


def group_sizes_chart(groups: list[dict[str, Any]], steps: int) -> Image:
    """A picture of the number of workers over the steps of a stage; `groups` as `Supervisor` records them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image as PILImage

    figure = Figure(figsize=(8, 2.5), layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = [*(group["step"] for group in groups), steps]
    axes.stairs([group["workers"] for group in groups], edges, baseline=0, fill=True, alpha=0.5)
    axes.set(xlabel="step", ylabel="workers", xlim=(edges[0], max(steps, edges[0] + 1)), ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.draw()
    return PILImage.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
