"""How well an image tokenizer reconstructs: errors and codes in use over many images, a picture of a few.

Shape suffixes: N images, B a batch of them, C channels, H height, W width, K codebook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor

from calumma.model.images import to_image
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.platform.training.images.data import as_floats


class ReconstructionErrors(NamedTuple):
    """How well images are reconstructed: mean squared error of values in [-1, 1], and mean absolute error a pixel and
    channel in 0..255; which codes they used (BoolTensor [K]); how many they were."""

    squared: float
    absolute: float
    used_K: Tensor
    images: int


@torch.inference_mode()
def measure_reconstruction(
    tokenizer: ImageTokenizer,
    images_NCHW: Tensor,
    batch: int = 64,
    all_reduce: Callable[[Tensor], object] | None = None,
    beat: Callable[[], None] | None = None,
) -> ReconstructionErrors:
    """Encode and decode every image (ByteTensor [N, 3, H, W]) as serving does: clamped to what a picture can hold.

    With `all_reduce`, which sums a tensor over all workers in place, it is measured over the images of all of them;
    every worker calls it. `beat` is called after each batch.
    """
    device = tokenizer.codebook.weight.device
    used_K = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool)
    squared, absolute, number = 0.0, 0.0, len(images_NCHW)
    for pixels in images_NCHW.split(batch) if number else ():
        x = as_floats(pixels.to(device))
        codes = tokenizer.encode(x)
        used_K[codes.flatten().cpu()] = True
        difference = tokenizer.decode(codes).clamp(-1, 1) - x
        squared += difference.square().sum().item()
        absolute += difference.abs().sum().item() * 127.5
        if beat is not None:
            beat()
    if all_reduce is not None:
        sums = torch.tensor([squared, absolute, number, *used_K.tolist()], dtype=torch.float64, device=device)
        all_reduce(sums)
        squared, absolute, number = float(sums[0]), float(sums[1]), int(sums[2])
        used_K = (sums[3:] > 0).cpu()
    values = max(1, number * 3 * tokenizer.config.resolution**2)
    return ReconstructionErrors(squared / values, absolute / values, used_K, number)


def comparison(tokenizer: ImageTokenizer, images_NCHW: Tensor, enlarge: int = 2) -> PILImage.Image:
    """A picture of images (ByteTensor [N, 3, H, W]) above their reconstructions."""
    device = tokenizer.codebook.weight.device
    x = as_floats(images_NCHW.to(device))
    rows = [x, tokenizer.decode(tokenizer.encode(x))]
    size = tokenizer.config.resolution
    canvas = PILImage.new("RGB", (size * len(x), size * len(rows)), "white")
    for y, row in enumerate(rows):
        for x_at, image in enumerate(row):
            canvas.paste(to_image(image), (x_at * size, y * size))
    return canvas.resize((canvas.width * enlarge, canvas.height * enlarge), PILImage.Resampling.NEAREST)
