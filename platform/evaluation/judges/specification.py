"""Which judge looks at answers, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.specification import Section


class JudgeSpecification(Section):
    """Who looks at answers. `keywords`: a policy of words; `classifier`: a text classifier of transformers;
    `endpoint`: a model behind an OpenAI-compatible API, say Llama Guard behind vLLM; `model`: one of ours."""

    kind: Literal["keywords", "classifier", "endpoint", "model"] = Field(description="what looks at the answers")
    policy: str | None = Field(
        None, description="keywords: a YAML file, category -> patterns; none: the one that ships"
    )
    location: str | None = Field(None, description="classifier: a folder as transformers keeps it; model: a directory")
    unsafe_labels: list[str] = Field(
        ["unsafe", "toxic", "LABEL_1"], description="classifier: labels that mean unsafe; any other is safe"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="classifier: least probability of an unsafe label")
    system: SystemSpecification | None = Field(None, description="endpoint: its URL and how it is asked")
    question: str | None = Field(None, description="endpoint: what it is asked; {prompt} and {answer} stand for these")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"classifier": "location", "endpoint": "system", "model": "location"}.get(self.kind)
        if needed and getattr(self, needed) is None:
            raise ValueError(f"a judge of the kind {self.kind} needs `{needed}`")
        return self
