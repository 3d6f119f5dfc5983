"""A course: what a quickstart teaches a model, from which recipes, and what of it is measured.

The digits' course is in `steps`, that of pictures in colour in `calumma.jobs.emoji.course`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from calumma.platform.specification import JobSpecification

if TYPE_CHECKING:
    from calumma.jobs.quickstart.questions import Question
    from calumma.platform.cluster.progress import Progress
    from calumma.platform.reports.contact_sheet import Cell
    from calumma.platform.storage.manifest import Manifest


@dataclass(frozen=True)
class Step:
    """`name`: of the recipe, the MLflow run and the entry in results.json. `usual`: seconds on two ordinary cores."""

    name: str
    title: str
    usual: float


CLUSTER = Step("cluster", "Ray cluster", 7)  # started once, before the first step that needs it
FROM_IMAGE_TOKENIZER = {
    "image_reconstruction_error": "Image tokenizer: squared error, held out",
    "codebook_used": "Image tokenizer: codes in use",
}


class Extent(Protocol):
    """How much of a course's data: see the quickstart's options."""

    @property
    def fast(self) -> bool: ...
    @property
    def large(self) -> bool: ...
    @property
    def sets(self) -> str | None: ...


@dataclass(frozen=True)
class Course:
    """`name`: of the MLflow experiment and the usual working folder. `recipes`: their folder below calumma.jobs.

    `documents(shared, extent)` is the first step's specification from fields that all share; `write` does it,
    `samples` gives pictures to look at by part, `questions` what is asked at the end; these three take it.
    `measured`: metric -> what it is, first the evaluation's; `targets` what is meant to be reached; `plain` those that
    are no shares. `kinds`: kind of question -> title; `sheets`: the evaluation's sheet -> title.
    """

    name: str
    recipes: str
    lead: str
    steps: tuple[Step, ...]
    documents: Callable[[dict[str, Any], Extent], JobSpecification]
    write: Callable[[Any, Progress], Manifest]
    samples: Callable[[Any], dict[str, list[Cell]]]
    questions: Callable[[Any], list[Question]]
    measured: dict[str, str]
    targets: dict[str, float]
    kinds: dict[str, str]
    sheets: dict[str, str]
    reconstructions: str
    plain: frozenset[str] = frozenset({"image_reconstruction_error"})

    @property
    def titles(self) -> dict[str, str]:
        """Of steps, the cluster's too."""
        return {step.name: step.title for step in (*self.steps, CLUSTER)}

    def goal(self, name: str) -> str:
        """A target in few characters; none: empty."""
        if name not in self.targets:
            return ""
        return f"≥ {self.targets[name]:.0%}" if self.targets[name] < 1 else "100%"

    def missed(self, name: str, value: float) -> bool:
        return name in self.targets and value < self.targets[name]

    def shown(self, name: str, value: float) -> str:
        """A result as people read it."""
        return f"{value:.4f}" if name in self.plain else f"{value:.1%}"
