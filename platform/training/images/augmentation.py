"""What a step sees of an image in place of the whole of it: a part, its mirror image, another size.

What is drawn depends on the seed, the step and the image's place in the global batch, not on the number of workers.

Shape suffixes: B a batch of images, C channels, H height, W width.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from calumma.platform.training.sections import ImageAugmentation
from calumma.platform.training.specification import ImageTokenizerSpecification


def seen_in_step(x_BCHW: Tensor, spec: ImageTokenizerSpecification, step: int, first: int) -> Tensor:
    """FloatTensor [B, 3, H, W] -> the same images as this step sees them; `first`: the place of the first of them in
    the global batch."""
    augmentation = spec.augmentation
    if augmentation.mirror or augmentation.smallest_crop < 1:
        x_BCHW = torch.stack(
            [
                _augmented(x_CHW, augmentation, random.Random(f"{spec.seed} {step} {first + place}"))
                for place, x_CHW in enumerate(x_BCHW)
            ]
        )
    if not spec.resolutions:
        return x_BCHW
    size = random.Random(f"{spec.seed} {step}").choice(spec.resolutions)
    return x_BCHW if size == x_BCHW.shape[-1] else F.interpolate(x_BCHW, size=(size, size), mode="area")


def _augmented(x_CHW: Tensor, augmentation: ImageAugmentation, chance: random.Random) -> Tensor:
    size = x_CHW.shape[-1]
    if augmentation.smallest_crop < 1:
        side = round(size * chance.uniform(augmentation.smallest_crop, 1))
        top, left = (chance.randint(0, size - side) for _ in range(2))
        part_CHW = x_CHW[:, top : top + side, left : left + side]
        x_CHW = F.interpolate(part_CHW[None], size=(size, size), mode="bilinear", antialias=True)[0]
    if chance.random() < augmentation.mirror:
        x_CHW = x_CHW.flip(-1)
    return x_CHW
