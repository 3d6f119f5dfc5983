"""How drawn pictures compare with real ones: a Fréchet distance, and how near the nearest training picture is.

The Fréchet distance is of the judge's colour features brought to principal components of real training pictures, not of
Inception's: it compares sets drawn at the same size on one machine, not with published figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage

from calumma.platform.evaluation.judge import colour_features
from calumma.platform.evaluation.metrics.pictures import distinct, frechet

COMPONENTS = 24  # few beside the pictures that are compared: a covariance of more would be noise
SIDE = 32


class Likeness:
    """`training`: the pictures the model has learned from."""

    def __init__(self, training: Sequence[PILImage.Image]) -> None:
        from sklearn.decomposition import PCA

        seen = colour_features(training)
        self._components = PCA(min(COMPONENTS, *seen.shape), random_state=0).fit(seen)
        self._pixels = _rows(training)

    def measure(self, drawn: Sequence[PILImage.Image], real: Sequence[PILImage.Image]) -> dict[str, float]:
        """Of drawn pictures beside the real ones of the same cases. Distances of pictures are root mean squares of
        their pixels' differences, in [0, 1]. Nothing of fewer than two pictures.

        frechet: smaller is more alike. nearest: from a drawn picture to the nearest training picture, the mean;
        nearest_real: the same of the real ones, which the model has not seen. copies: the share of drawn pictures
        nearer to a training picture than nine in ten real ones. distinct: the share no earlier one equals.
        """
        if min(len(drawn), len(real)) < 2:
            return {}
        ours, theirs = self.distances(drawn), self.distances(real)
        return {
            "frechet": frechet(*(self._components.transform(colour_features(each)) for each in (real, drawn))),
            "nearest": float(ours.mean()),
            "nearest_real": float(theirs.mean()),
            "copies": float((ours < np.quantile(theirs, 0.1)).mean()),
            "distinct": distinct(drawn),
        }

    def distances(self, pictures: Sequence[PILImage.Image]) -> np.ndarray:
        """Float64 [N]: to the nearest training picture."""
        rows = _rows(pictures)
        squares = (rows**2).sum(1)[:, None] + (self._pixels**2).sum(1)[None] - 2 * rows @ self._pixels.T
        return np.sqrt(np.maximum(squares, 0).min(1) / rows.shape[1])


def _rows(pictures: Sequence[PILImage.Image]) -> np.ndarray:
    return np.stack([
        np.asarray(p.convert("RGB").resize((SIDE, SIDE), PILImage.Resampling.BOX), np.float64).ravel() / 255
        for p in pictures
    ])  # fmt: skip
