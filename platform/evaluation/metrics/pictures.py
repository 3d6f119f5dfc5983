"""Pictures as numbers: PSNR and SSIM of a copy, the Fréchet distance of two sets, how much drawings differ.

SSIM: Wang 2004, a Gaussian window of 11 pixels; the Fréchet distance of features: Heusel et al., arXiv 1706.08500.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

WINDOW, SIGMA = 11, 1.5
LEAST = WINDOW // 2 + 1
K1, K2 = 0.01, 0.03
Pixels = NDArray[np.float64]  # [H, W, 3] in [0, 1]


def pixels(image: PILImage.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), np.float64) / 255


def psnr(one: Pixels, other: Pixels) -> float:
    """Decibels; of equal pictures 100, so that means stay finite."""
    error = float(((one - other) ** 2).mean())
    return min(100.0, -10 * math.log10(error)) if error else 100.0


def ssim(one: Pixels, other: Pixels) -> float:
    """Structural similarity, the mean over places and colours; 1 for equal pictures, of at least 6x6 pixels. At edges
    pictures are mirrored, as torchmetrics has it."""
    if min(one.shape[:2]) < LEAST:
        raise ValueError(f"SSIM needs {LEAST}x{LEAST} pixels at least; the picture has {one.shape[1]}x{one.shape[0]}")
    means = [_blurred(values) for values in (one, other, one * one, other * other, one * other)]
    a, b, aa, bb, ab = means
    variance_a, variance_b, common = aa - a * a, bb - b * b, ab - a * b
    c1, c2 = K1**2, K2**2
    map_ = ((2 * a * b + c1) * (2 * common + c2)) / ((a * a + b * b + c1) * (variance_a + variance_b + c2))
    return float(map_.mean())


def _blurred(values: Pixels) -> Pixels:
    """By a separable Gaussian."""
    distance = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-(distance**2) / (2 * SIGMA**2))
    window /= window.sum()
    values = np.pad(values, ((WINDOW // 2,) * 2, (WINDOW // 2,) * 2, (0, 0)), mode="reflect")
    for axis in (0, 1):
        views = np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis)
        values = views @ window
    return values


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Between Gaussians of two sets of features [N, D]. Raises ValueError below two pictures each."""
    if min(len(one), len(other)) < 2:
        raise ValueError(
            f"the Fréchet distance needs two pictures of each at least, there are {len(one)}, {len(other)}"
        )
    means, roots = [], []
    for features in (one, other):
        means.append(features.mean(0))
        centred = (features - means[-1]) / math.sqrt(len(features) - 1)  # covariance: its transpose times itself
        root: NDArray[np.float64] = centred
        if len(centred) > centred.shape[1]:
            root = np.asarray(np.linalg.qr(centred, mode="r"))
        roots.append(root)
    difference = means[0] - means[1]
    # The trace of the covariances' root is the sum of the singular values of their roots' product: of the size of the
    # fewer of pictures and features, and without the root of a matrix that is nearly singular.
    common = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(difference @ difference + (roots[0] ** 2).sum() + (roots[1] ** 2).sum() - 2 * common)


def diversity(pictures: Sequence[PILImage.Image], side: int = 32) -> float:
    """The mean distance of two pictures: root mean square of their pixels' differences, in [0, 1]. 0: all the same."""
    if len(pictures) < 2:
        return 0.0
    rows = np.stack([pixels(p.convert("RGB").resize((side, side), PILImage.Resampling.BOX)).ravel() for p in pictures])
    squares = (rows**2).sum(1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0) / rows.shape[1]
    upper = np.triu_indices(len(rows), 1)
    return round(float(np.sqrt(distances[upper]).mean()), 6)  # equal pictures: rounding leaves 1e-9


def distinct(pictures: Sequence[PILImage.Image]) -> float:
    """The share of pictures that no earlier one equals pixel by pixel."""
    seen = {(picture.size, picture.convert("RGB").tobytes()) for picture in pictures}
    return len(seen) / len(pictures) if pictures else 0.0
