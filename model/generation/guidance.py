"""Classifier-free guidance by text and by images (paper, "Generation"), of all of an image or a part of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calumma.model.generation.request import SamplingParams, Schedule


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


@dataclass(frozen=True)
class GuidanceInterval:
    """The codes `start` to `stop - 1` of an image are guided, with these weights at full strength."""

    weights: GuidanceWeights
    start: int
    stop: int
    schedule: Schedule

    @classmethod
    def of(cls, params: SamplingParams, images_before: bool, length: int) -> GuidanceInterval:
        weights = GuidanceWeights.of(params, images_before)
        start, stop = round(params.guidance_begin * length), round(params.guidance_end * length)
        if not weights.branches or start == stop:
            return cls(weights, length, length, params.guidance_schedule)
        return cls(weights, start, stop, params.guidance_schedule)

    def alike(self, code: int, length: int) -> int:
        """How many codes from this one on are drawn from the same branches, of an image of so many."""
        return min(edge for edge in (self.start, self.stop, length) if edge > code) - code

    def strength(self, code: int) -> float:
        """Of guidance at a code, 0 to 1: the full context weighs 1 + strength * (full - 1), a branch strength * its
        weight, which is guidance by scales that are so far from 1."""
        if not self.start <= code < self.stop:
            return 0.0
        part = (code - self.start + 1) / (self.stop - self.start)
        if self.schedule == "linear":
            return part
        return (1 - math.cos(math.pi * part)) / 2 if self.schedule == "cosine" else 1.0
