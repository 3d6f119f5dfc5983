"""The independent judge of drawn pictures: scikit-learn's support vector classifier, trained on real training scans.

It never sees the model, its tokens or a held-out scan; its own held-out accuracy stands beside every verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as PILImage

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE = 8  # pixels; the resolution at which the digits were published


class JudgeDataError(ValueError):
    """The judge's documents hold no labelled images, or only one label."""


def features(pictures: Sequence[PILImage.Image]) -> np.ndarray:
    """Float32 [N, 64] in [0, 1]: each picture in grey, averaged over the boxes of an 8x8 grid."""
    rows = [
        np.asarray(p.convert("L").resize((SIDE, SIDE), PILImage.Resampling.BOX), dtype=np.float32).ravel() / 255
        for p in pictures
    ]
    return np.stack(rows) if rows else np.zeros((0, SIDE * SIDE), np.float32)


class Judge:
    """Says which label a picture shows."""

    def __init__(self, classifier: Any) -> None:
        self._classifier = classifier

    @classmethod
    def train(cls, labelled: Sequence[tuple[PILImage.Image, str]]) -> Judge:
        """A radial-basis SVC (C=10, gamma "scale"). Raises JudgeDataError."""
        from sklearn.svm import SVC

        labels = [label for _, label in labelled]
        if len(set(labels)) < 2:
            raise JudgeDataError(
                f"the judge needs images of at least two labels, found {len(labels)} images of {sorted(set(labels))}; "
                "check `judge_training`: curated documents whose images carry captions"
            )
        return cls(SVC(C=10.0, gamma="scale").fit(features([picture for picture, _ in labelled]), labels))

    def classify(self, pictures: Sequence[PILImage.Image]) -> list[str]:
        if not pictures:
            return []
        return [str(label) for label in self._classifier.predict(features(pictures))]

    def accuracy(self, labelled: Sequence[tuple[PILImage.Image, str]]) -> float:
        """Share of labelled pictures judged rightly. Raises JudgeDataError when there are none."""
        if not labelled:
            raise JudgeDataError("there are no held-out images with captions; check `judge_held_out`")
        predicted = self.classify([picture for picture, _ in labelled])
        return sum(a == label for a, (_, label) in zip(predicted, labelled, strict=True)) / len(labelled)
