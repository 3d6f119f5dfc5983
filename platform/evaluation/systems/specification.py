"""Which system is asked, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.specification import Section, basename


class PictureSampling(Section):
    """How the pictures of answers are drawn; the defaults are the public release's. Fit them on pictures that are not
    those one measures with."""

    temperature: float = Field(0.7, ge=0, le=2, description="of image codes; 0: the likeliest code")
    top_p: float = Field(0.9, gt=0, le=1, description="of image codes: the likeliest that have this share together")
    guidance_text: float = Field(3.0, ge=0, description="how far a picture follows its text; 1: no guidance")
    guidance_image: float = Field(
        1.2, ge=0, description="how far a picture follows the pictures before it; 1: no guidance"
    )


class SystemSpecification(Section):
    """A model directory or `models:/…`, answered by engines on the cluster, or the URL of an OpenAI-compatible API."""

    model: str | None = Field(None, description="model directory, or models:/name@alias; or give `url`")
    url: str | None = Field(
        None, pattern=r"^https?://", description="OpenAI-compatible endpoint, with its /v1; or give `model`"
    )
    name: str = Field("", description="what pages call it; default: of the model or endpoint")
    served_model: str | None = Field(None, description="`model` in requests to the endpoint; none: its first")
    api_key: str | None = Field(None, description="environment variable that holds the endpoint's key")
    images: Literal["chat", "images", "none"] = Field(
        "chat", description="how an endpoint draws: in chat answers, by /v1/images/generations, or not at all"
    )
    concurrency: int = Field(8, ge=1, le=1024, description="requests at once to an endpoint")
    timeout: float = Field(600, gt=0, description="seconds that an endpoint may take for one answer")
    patience: float = Field(
        3600, ge=0, description="seconds that an endpoint may be away, while the run pauses, before it ends"
    )
    batch: int = Field(16, ge=1, description="prompts that an engine answers at once")
    dtype: Literal["float32", "bfloat16", "float64"] | None = Field(
        None, description="of a model's weights; none: as stored"
    )

    pictures: PictureSampling | None = Field(
        None,
        description="how pictures are drawn; null: as the public release does, of an endpoint as it does by itself",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.model is None) == (self.url is None):
            raise ValueError("give either `model` (a directory or models:/…) or `url` (an endpoint), and not both")
        return self

    @property
    def title(self) -> str:
        return self.name or self.served_model or basename(self.model or self.url or "")

    @classmethod
    def of(cls, location: str, **fields: object) -> SystemSpecification:
        """Of what a person types: a URL is an endpoint, anything else a model."""
        key = "url" if location.startswith(("http://", "https://")) else "model"
        return cls.model_validate({key: location, **fields})
