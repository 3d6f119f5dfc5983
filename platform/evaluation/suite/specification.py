"""What a suite may be asked."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.judges.specification import JudgeSpecification
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import JobSpecification, repeated

MINIATURE = "miniature"


class SuiteSpecification(JobSpecification):
    """A system's figures on many benchmarks, beside the paper's; every benchmark from its publisher's own files."""

    job: Literal["evaluate_suite"] = "evaluate_suite"
    suite: Literal["paper", "safety", "none"] = Field(
        "paper", description="which tasks: those of the paper's tables, of its safety test, or `tasks` alone"
    )
    system: SystemSpecification = Field(description="a model, or an endpoint")
    data: str = Field(
        MINIATURE,
        description="location with a folder for each benchmark; `miniature`: the dozen items of each that ship",
    )
    only: list[str] = Field([], description="names of the suite's tasks to do; none: all")
    tasks: list[SuiteTask] = Field([], description="further tasks, or others in place of the suite's of their name")
    judges: dict[str, JudgeSpecification] = Field({}, description="judges by name")
    limit: int | None = Field(None, ge=1, description="items of a task at most, the first ones")
    training: list[str] = Field(
        [], description="curated documents that the model was trained on: items that they hold are told"
    )
    skip_missing: bool = Field(False, description="leave out tasks without data, and tell them, where others end")
    output: str = Field("evaluations/suite", description="folder of the page, figures, answers and pictures")

    @property
    def checkpoints(self) -> str:
        """Where finished tasks, and answers of those under way, are kept."""
        return f"{self.output_uri.rstrip('/')}/tasks"

    @model_validator(mode="after")
    def _names(self) -> Self:
        if twice := repeated(task.name for task in self.tasks):
            raise ValueError(f"tasks: names given twice: {', '.join(twice)}")
        known = set(self.judges)
        for task in self.tasks:
            if unknown := sorted(set(task.judges) - known):
                raise ValueError(f"tasks: {task.name} names judges that are not among `judges`: {', '.join(unknown)}")
        return self
