"""Scorers that need no model: measures of images and texts, to be named as a scorer's `factory`. Those with one that is
at hand are in models.py.

A scorer with a model is a class or function of one's own. It is made once in every actor, so it loads its weights once,
onto the GPU that its `resources` ask for; calls take lists, so that it can work in batches:

    class Faces:
        def __init__(self, weights: str) -> None:
            self.detector = load_detector(weights, "cuda")

        def __call__(self, images: list[PIL.Image.Image]) -> list[float]:
            return [float(len(boxes) > 0) for boxes in self.detector(images)]

    scorers:
      faces:
        factory: my_package.faces:Faces
        arguments: {weights: /models/faces.pt}
        reduce: max                          # one face in one image is enough
        upsample: {above: 0.5, times: 2}     # paper section 2.1
        resources: {workers: 8, gpus_per_worker: 1}
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image as PILImage

from calumma.model.document import Document
from calumma.platform.curation.steps.words import all_text

ImageScorer = Callable[[list[PILImage.Image]], list[float]]
DocumentScorer = Callable[[list[Document]], list[float]]


def sharpness(side: int = 512) -> ImageScorer:
    """Variance of the Laplacian of the grey image, scaled down to `side` pixels: low where all is blurred or flat
    (Pech-Pacheco et al. 2000). Photographs in focus have hundreds."""

    def one(image: PILImage.Image) -> float:
        grey = _at_most(image.convert("L"), side)
        if min(grey.shape) < 3:
            return 0.0
        middle = grey[1:-1, 1:-1]
        around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
        return float((around - 4 * middle).var())

    return lambda images: [one(image) for image in images]


def colourfulness(side: int = 512) -> ImageScorer:
    """Spread and strength of opponent colours (Hasler and Süsstrunk 2003): 0 for grey, from about 15 a little
    colourful, from about 60 highly."""

    def one(image: PILImage.Image) -> float:
        red, green, blue = np.moveaxis(_at_most(image.convert("RGB"), side), -1, 0)
        first, second = red - green, (red + green) / 2 - blue
        return float(np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean()))

    return lambda images: [one(image) for image in images]


def _at_most(image: PILImage.Image, side: int) -> np.ndarray:
    image = image.copy()
    image.thumbnail((side, side))
    return np.asarray(image, np.float64)


def compressibility() -> DocumentScorer:
    """Bytes of a document's text for each byte it deflates to: about 2 to 3 for prose, much more for text that repeats
    itself."""

    def one(document: Document) -> float:
        data = all_text(document).encode("utf-8", "surrogatepass")
        return len(data) / len(zlib.compress(data, 6)) if data else 0.0

    return lambda documents: [one(document) for document in documents]
