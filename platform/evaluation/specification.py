"""What an evaluation may be asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calumma.platform.evaluation.systems.specification import PictureSampling
from calumma.platform.specification import JobSpecification, Section


class EvaluationTask(Section):
    """`recognition`: image -> word. `generation`: word -> image, judged. `interleaved`: both in turn, judged."""

    name: str = Field(description="in metrics and of the files of its answers")
    kind: Literal["recognition", "generation", "interleaved"] = Field(description="what is asked and how it is judged")
    documents: str = Field(
        description="curated conversations: the user's turn is the prompt, the assistant's the answer"
    )
    limit: int | None = Field(None, ge=1, description="cases, the first ones; none: all")


class Classifier(Section):
    """The independent classifier of drawn pictures."""

    features: Literal["grey", "colour"] = Field(
        "grey", description="what it sees of a picture: 8x8 shades of grey, or colours and the directions of edges"
    )
    parts: list[str] = Field(
        [], description="names of the parts of a label, which stand with ` | ` between them; each is judged apart"
    )


class EvaluateSpecification(JobSpecification):
    """A model's answers to held-out conversations, judged by their words and by an independent classifier."""

    job: Literal["evaluate"] = "evaluate"
    model: str = Field(description="model directory, or models:/name@alias")
    tasks: list[EvaluationTask] = Field(min_length=1)
    judge_training: str = Field(description="curated images with captions as labels: trains the independent classifier")
    judge_held_out: str = Field(description="the same, held out: measures the classifier itself")
    judge: Classifier = Classifier()
    training_pictures: str | None = Field(
        None,
        description="curated images the model has learned from: drawn pictures are compared with them and with the "
        "expected ones (Fréchet distance, nearest training picture)",
    )
    pictures: PictureSampling = PictureSampling()
    labels: list[str] = Field([], description="what pictures may show, in the order of the confusion matrix")
    suite: Literal["paper", "safety", "none"] = Field(
        "none", description="benchmarks beside the tasks; tasks come in place of those of the same name"
    )
    data: str = Field("miniature", description="of the suite: as in the job evaluate_suite")
    only: list[str] = Field([], description="names of the suite's benchmarks to do; none: all")
    batch: int = Field(32, ge=1, description="prompts answered at once")
    output: str = Field("evaluation", description="folder of the page, answers, marks and contact sheets")

    @property
    def checkpoints(self) -> str:
        """Where finished tasks, and answers of those under way, are kept."""
        return f"{self.output_uri.rstrip('/')}/tasks"
