"""Which judge looks at answers, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import Section


class JudgeSpecification(Section):
    """Who looks at answers. `keywords`: a policy of words; `classifier`: a text classifier of transformers;
    `endpoint`: a model behind an OpenAI-compatible API, say Llama Guard behind vLLM; `model`: one of ours; `pictures`:
    a classifier trained here on pictures with labels, which names what a picture shows."""

    kind: Literal["keywords", "classifier", "endpoint", "model", "pictures"] = Field(
        description="what looks at the answers"
    )
    policy: str | None = Field(
        None, description="keywords: a YAML file, category -> patterns; none: the one that ships"
    )
    location: str | None = Field(None, description="classifier: a folder as transformers keeps it; model: a directory")
    unsafe_labels: list[str] = Field(
        ["unsafe", "toxic", "LABEL_1"], description="classifier: labels that mean unsafe; any other is safe"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="classifier: least probability of an unsafe label")
    training: str | None = Field(None, description="pictures: curated images with captions as labels, to be trained on")
    held_out: str | None = Field(None, description="pictures: the same, held out: measures the judge itself")
    features: Literal["grey", "colour"] = Field("grey", description="pictures: what it sees of a picture")
    parts: list[str] = Field([], description="pictures: names of the parts of a label, ` | ` between them")
    system: SystemSpecification | None = Field(None, description="endpoint: its URL and how it is asked")
    question: str | None = Field(None, description="endpoint: what it is asked; {prompt} and {answer} stand for these")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"classifier": "location", "endpoint": "system", "model": "location", "pictures": "training"}.get(
            self.kind
        )
        if needed and getattr(self, needed) is None:
            raise ValueError(f"a judge of the kind {self.kind} needs `{needed}`")
        return self
