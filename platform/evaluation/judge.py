"""The independent judge of drawn pictures: scikit-learn's classifiers, trained on real pictures.

It never sees the model or its tokens; its own accuracy on pictures that it was not trained on stands beside every
verdict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image as PILImage

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE = 8  # pixels; the resolution at which the digits were published
SEPARATOR = " | "  # between the parts of a label
COLOUR_SIDE, CELLS, DIRECTIONS, SHADES, COMPONENTS = 16, 8, 8, 6, 160
HISTOGRAM_WEIGHT = 3.0  # of shares of colours beside the rest, of which there are six times as many numbers
Features = Literal["grey", "colour"]


class JudgeDataError(ValueError):
    """The judge's documents hold no labelled images, or only one label."""


def labelled_pictures(uri: str) -> list[tuple[PILImage.Image, str]]:
    """Pictures with their captions, of curated documents that have both. Raises StorageError."""
    from calumma.platform.shards.documents import read_documents

    return [(i.open(), i.caption) for document in read_documents(uri) for i in document.images if i.caption]


def features(pictures: Sequence[PILImage.Image]) -> np.ndarray:
    """Float32 [N, 64] in [0, 1]: each picture in grey, averaged over the boxes of an 8x8 grid."""
    rows = [
        np.asarray(p.convert("L").resize((SIDE, SIDE), PILImage.Resampling.BOX), dtype=np.float32).ravel() / 255
        for p in pictures
    ]
    return np.stack(rows) if rows else np.zeros((0, SIDE * SIDE), np.float32)


def colour_features(pictures: Sequence[PILImage.Image]) -> np.ndarray:
    """Float32 [N, 1496]: colours averaged over a 16x16 grid; how strongly edges run in eight directions in each cell of
    an 8x8 grid (histograms of oriented gradients, Dalal and Triggs 2005); and how much there is of each of 216 colours,
    wherever it is, but of white."""
    return np.stack([_colours_and_edges(p.convert("RGB")) for p in pictures])


def _colours_and_edges(picture: PILImage.Image) -> np.ndarray:
    colours = np.asarray(picture.resize((COLOUR_SIDE,) * 2, PILImage.Resampling.BOX), np.float32).ravel() / 255
    grey = np.asarray(picture.convert("L").resize((64, 64), PILImage.Resampling.BOX), np.float32) / 255
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = np.floor(np.arctan2(down, right) % np.pi / np.pi * DIRECTIONS).astype(int) % DIRECTIONS
    side = len(grey) // CELLS
    rows, columns = np.indices(grey.shape) // side
    cells = np.zeros((CELLS, CELLS, DIRECTIONS), np.float32)
    np.add.at(cells, (rows, columns, direction), strength)
    cells /= np.linalg.norm(cells, axis=-1, keepdims=True) + 0.5
    shades = np.asarray(picture.resize((64, 64), PILImage.Resampling.BOX), int) * SHADES // 256
    amounts = np.zeros((SHADES,) * 3, np.float32)
    np.add.at(amounts, tuple(shades.reshape(-1, 3).T), 1)
    amounts[-1, -1, -1] = 0
    shares = np.sqrt(amounts / max(1.0, float(amounts.sum())))
    return np.concatenate([colours, cells.ravel(), HISTOGRAM_WEIGHT * shares.ravel()])


class Judge:
    """Says which label a picture shows. `parts`: how many parts a label has; each has a classifier of its own."""

    def __init__(self, classifiers: Sequence[Any], kind: Features = "grey") -> None:
        self._classifiers = list(classifiers)
        self._features = colour_features if kind == "colour" else features

    @classmethod
    def train(cls, labelled: Sequence[tuple[PILImage.Image, str]], kind: Features = "grey", parts: int = 1) -> Judge:
        """Of grey pictures a radial-basis SVC (C=10, gamma "scale"); of coloured ones, which have many labels of few
        pictures, logistic regression on principal components. Raises JudgeDataError."""
        labels = [label for _, label in labelled]
        if len(set(labels)) < 2:
            raise JudgeDataError(
                f"the judge needs images of at least two labels, found {len(labels)} images of {sorted(set(labels))}; "
                "check `judge_training`: curated documents whose images carry captions"
            )
        split = [label.split(SEPARATOR) if parts > 1 else [label] for label in labels]
        if odd := next((label for label, own in zip(labels, split, strict=True) if len(own) != parts), None):
            raise JudgeDataError(f"the label {odd!r} has not {parts} parts with {SEPARATOR!r} between them")
        judge = cls([], kind)
        seen = judge._features([picture for picture, _ in labelled])
        judge._classifiers = [_fitted(kind, seen, [own[part] for own in split]) for part in range(parts)]
        return judge

    @property
    def labels(self) -> list[str]:
        """Of all parts."""
        return [str(label) for own in self._classifiers for label in own.classes_]

    def classify(self, pictures: Sequence[PILImage.Image]) -> list[str]:
        """Labels, of several parts as of one."""
        if not pictures:
            return []
        seen = self._features(pictures)
        return [
            SEPARATOR.join(map(str, own)) for own in zip(*(c.predict(seen) for c in self._classifiers), strict=True)
        ]

    def accuracy(self, labelled: Sequence[tuple[PILImage.Image, str]]) -> float:
        """Share of labelled pictures judged rightly. Raises JudgeDataError when there are none."""
        return float(np.mean([all(own) for own in self.marks(labelled)]))

    def marks(self, labelled: Sequence[tuple[PILImage.Image, str]]) -> list[tuple[bool, ...]]:
        """Of each picture, which parts of its label it is given. Raises JudgeDataError when there are none."""
        if not labelled:
            raise JudgeDataError("there are no held-out images with captions; check `judge_held_out`")
        predicted = self.classify([picture for picture, _ in labelled])
        return [right_parts(a, label) for a, (_, label) in zip(predicted, labelled, strict=True)]


def right_parts(judged: str, label: str) -> tuple[bool, ...]:
    """Which parts of a label are judged rightly."""
    return tuple(a == b for a, b in zip(judged.split(SEPARATOR), label.split(SEPARATOR), strict=False))


def _fitted(kind: Features, seen: np.ndarray, labels: Sequence[str]) -> Any:
    from sklearn.decomposition import PCA
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import SVC

    if len(set(labels)) == 1:
        return DummyClassifier(strategy="most_frequent").fit(seen, labels)
    if kind == "grey":
        return SVC(C=10.0, gamma="scale").fit(seen, labels)
    components = PCA(min(COMPONENTS, *seen.shape), random_state=0)
    return make_pipeline(components, LogisticRegression(C=10.0, max_iter=500)).fit(seen, labels)
