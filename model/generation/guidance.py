"""Classifier-free guidance by text and by images (paper, "Generation")."""

from __future__ import annotations

from dataclasses import dataclass

from calumma.model.generation.request import SamplingParams


@dataclass(frozen=True)
class GuidanceWeights:
    """Guidance as a weighted sum of logits: u + s_image (i - u) + s_text (f - i), sorted by branch.

    A branch of weight 0 need not be run. Without an earlier image in the context, i is u.
    """

    full: float
    images: float
    nothing: float

    @classmethod
    def of(cls, params: SamplingParams, images_before: bool) -> GuidanceWeights:
        text, image = params.guidance_text, params.guidance_image
        return cls(text, image - text, 1 - image) if images_before else cls(text, 0.0, 1 - text)

    @property
    def branches(self) -> int:
        return (self.images != 0) + (self.nothing != 0)
