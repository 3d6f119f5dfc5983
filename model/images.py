"""Pictures of any kind to upright RGB, to the tokenizer's square of pixels, and back.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

if TYPE_CHECKING:
    from torch import Tensor

# Above this many pixels an image is refused before it is decoded (a decompression bomb); 64 megapixels.
MAX_PIXELS = 64_000_000
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits, which Pillow's convert would clip
_WHITE_POINTS = (1.0, 255.0, 65535.0)


def rgb(image: PILImage.Image) -> PILImage.Image:
    """Any picture as 8-bit RGB: upright by its EXIF orientation, transparency on white, more than 8 bits a channel
    scaled down; of an animation the frame it stands at, which is the first where it was just opened.

    Raises ValueError above MAX_PIXELS, and what Pillow's decoders raise.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
    of_16_bits = image.mode.startswith("I;16") or image.format == "PPM"
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP:
        image = _to_8_bit(image, of_16_bits)
    if image.has_transparency_data:
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = PILImage.new("RGBA", layer.size, "white")
        image = PILImage.alpha_composite(canvas, layer)
    return image.convert("RGB")


def _to_8_bit(image: PILImage.Image, of_16_bits: bool) -> PILImage.Image:
    """Grey of 16 bits, 32 bits or floats -> 8 bits. White is 65535 where 16 bits are known, elsewhere the smallest
    of 1 (floats), 255 and 65535 that no pixel is above, or else the brightest pixel."""
    values_HW = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    white = 65535.0
    if not of_16_bits:
        brightest = float(values_HW.max(initial=0.0))
        points = _WHITE_POINTS if image.mode == "F" else _WHITE_POINTS[1:]
        white = next((point for point in points if brightest <= point), brightest)
    grey_HW = np.rint(values_HW.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    hidden = image.info.get("transparency")
    if not isinstance(hidden, int):
        return PILImage.fromarray(grey_HW)
    alpha_HW = np.where(np.asarray(image) == hidden, 0, 255).astype(np.uint8)  # one grey value stands for "nothing"
    return PILImage.fromarray(np.stack([grey_HW, alpha_HW], axis=-1))


def preprocess(image: PILImage.Image, resolution: int, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """FloatTensor [3, resolution, resolution] in [-1, 1]. `crop` centre-crops (answers and pre-training), `pad` keeps
    everything and fills the border with white (images in prompts; paper section 3.1)."""
    image = rgb(image)
    if fit == "crop":
        square = ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.LANCZOS)
    else:
        longer = max(image.size)
        width, height = (max(1, round(side * resolution / longer)) for side in image.size)
        square = PILImage.new("RGB", (resolution, resolution), "white")
        square.paste(
            image.resize((width, height), PILImage.Resampling.LANCZOS),
            ((resolution - width) // 2, (resolution - height) // 2),
        )
    array_HWC = np.array(square, dtype=np.uint8)
    import torch  # here: whoever only opens documents, or reads a specification, waits for no torch

    return torch.from_numpy(array_HWC).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x_CHW: Tensor) -> PILImage.Image:
    """FloatTensor [3, H, W], clamped to [-1, 1] -> RGB image."""
    pixels_CHW = ((x_CHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return PILImage.fromarray(pixels_CHW.permute(1, 2, 0).cpu().numpy(), mode="RGB")
