"""Real handwritten digits: 1,797 scans of 43 writers (UCI, Optical Recognition of Handwritten Digits; in scikit-learn).

Every use of a scan goes through `split`: a scan belongs to training or is held out, before anything is made of it.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RESOLUTION = 32  # pixels; the scans are 8x8
LICENSE = "CC-BY-4.0"
URL = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"


@dataclass(frozen=True)
class Scan:
    """One handwritten digit. `number` is its place in the published set; `ink_HW` float32 [32, 32] in [0, 1]."""

    number: int
    digit: int
    ink_HW: np.ndarray

    @property
    def word(self) -> str:
        return WORDS[self.digit]

    @property
    def name(self) -> str:
        return f"digit-{self.number:04d}"

    def picture(self) -> PILImage.Image:
        """White ink on black, 8-bit grey, 32x32."""
        return PILImage.fromarray(np.rint(self.ink_HW * 255).astype(np.uint8))

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.picture().save(buffer, format="PNG")
        return buffer.getvalue()

    def augmented(self, random: np.random.Generator, most: float = 1.0) -> Scan:
        """Another picture of the same ink: turned by up to 12 degrees, slanted by up to a sixth, 0.88 to 1.14 times as
        wide and as high, shifted by up to 2 pixels; all of it times `most`."""
        angle, slant = most * math.radians(random.uniform(-12, 12)), most * random.uniform(-1 / 6, 1 / 6)
        turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        back_22 = turned @ np.array([[1, slant], [0, 1]]) @ np.diag(random.uniform(0.88, 1.14, 2) ** -most)
        centre_2 = np.full(2, RESOLUTION / 2)  # Pillow counts from a pixel's corner
        origin_2 = centre_2 - back_22 @ (centre_2 + most * random.uniform(-2, 2, 2))
        where = tuple(np.column_stack([back_22, origin_2]).ravel().tolist())  # from a pixel to where it comes from
        moved = PILImage.fromarray(self.ink_HW).transform(
            (RESOLUTION, RESOLUTION), PILImage.Transform.AFFINE, where, PILImage.Resampling.BICUBIC
        )
        return Scan(self.number, self.digit, np.clip(np.asarray(moved, dtype=np.float32), 0, 1))


def read_scans() -> list[Scan]:
    """All 1,797 scans, enlarged from 8x8 to 32x32 by bicubic interpolation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = []
    for number, (grey_HW, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        small = PILImage.fromarray((grey_HW / 16).astype(np.float32))
        large = small.resize((RESOLUTION, RESOLUTION), PILImage.Resampling.BICUBIC)
        scans.append(Scan(number, int(digit), np.clip(np.asarray(large, dtype=np.float32), 0, 1)))
    return scans


def split(scans: list[Scan], seed: int, held_out: float = 0.2) -> tuple[list[Scan], list[Scan]]:
    """(training, held out): disjoint, together all, the same share of each digit held out; equal for equal seeds."""
    random = np.random.default_rng(seed)
    kept: list[Scan] = []
    away: list[Scan] = []
    for digit in range(len(WORDS)):
        own = [s for s in scans if s.digit == digit]
        order = random.permutation(len(own))
        cut = max(1, round(len(own) * held_out)) if len(own) > 1 else 0
        away += [own[i] for i in order[:cut]]
        kept += [own[i] for i in order[cut:]]
    return sorted(kept, key=lambda s: s.number), sorted(away, key=lambda s: s.number)
