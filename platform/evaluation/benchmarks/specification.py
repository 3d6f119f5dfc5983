"""What a task of a suite may be asked."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from calumma.platform.specification import Section

BenchmarkName = Literal[
    "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq", "gsm8k", "math",
    "mmlu", "coco", "flickr30k", "vqav2", "okvqa", "squad", "mnist", "mnist_drawn", "drawing", "reconstruction",
    "following", "interleaved", "safety", "look_alikes",
    "picture_to_word", "word_to_picture", "words_and_pictures",
]  # fmt: skip


class SuiteTask(Section):
    """One benchmark, read from its publisher's own files."""

    name: str = Field(pattern=r"^[\w.-]+$", description="in metrics, of the files of its answers, and in pages")
    benchmark: BenchmarkName = Field(description="whose files these are and how answers are graded")
    data: str | None = Field(
        None, description="location of its files; none: a folder of this name below the suite's data"
    )
    split: str | None = Field(None, description="of the benchmark's; none: the one that is reported")
    shots: int = Field(0, ge=0, le=64, description="examples in the prompt")
    limit: int | None = Field(None, ge=1, description="items, the first ones; none: all")
    votes: tuple[int, ...] = Field((1,), description="maj@k: the most frequent of so many answers counts")
    temperature: float = Field(0.7, gt=0, description="of answers where several are drawn")
    labels: list[str] = Field(
        [], description="of conversations: what pictures may show, in the order of the confusion matrix; none: by name"
    )
    parts: list[str] = Field([], description="of conversations: names of a label's parts, each judged apart")
    training_pictures: str | None = Field(
        None, description="of conversations: curated images that the model has learned from, to compare drawings with"
    )
    prompt: str | None = Field(None, description="in place of the benchmark's own words")
    judges: list[str] = Field([], description="which of the suite's judges look at its answers; none: all that can")
    weights: dict[str, str] = Field(
        {},
        description="locations of models that measure pictures: `inception` (TorchScript or .pth), `clip` (folder)",
    )
