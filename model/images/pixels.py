"""Pictures of any mode to upright sRGB, to the tokenizer's square of pixels, and back.

Shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage
from PIL.TiffImagePlugin import TiffImageFile

from calumma.model.images.color import to_srgb

if TYPE_CHECKING:
    from torch import Tensor

# Above this many pixels an image is refused before it is decoded (a decompression bomb); 64 megapixels.
MAX_PIXELS = 64_000_000
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits, which Pillow's convert would clip
_WHITE_POINTS = (1.0, 255.0, 65535.0)
_WITH_PROFILE = ("L", "RGB", "CMYK", "LAB")  # modes that a profile applies to as they are
_BITS_A_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}


def rgb(image: PILImage.Image) -> PILImage.Image:
    """Any picture as 8-bit sRGB: upright by its EXIF orientation, colours by its ICC profile, transparency on white,
    more than 8 bits a channel scaled down; of an animation the frame it stands at, which is the first where it was just
    opened. Nothing is left to do it again by: the result has neither profile nor orientation.

    Raises ValueError above MAX_PIXELS, and what Pillow's decoders raise.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} allowed")
    white, inverted = _white(image)
    image.load()
    turn = _turn(image)
    profile = image.info.get("icc_profile")
    if image.mode in _DEEP:
        image = _to_8_bit(image, white, inverted)
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La")
        image = image if image.mode == "LA" else image.convert("LA") if grey else image.convert("RGBA")
    elif image.mode not in _WITH_PROFILE:
        image = image.convert("L" if image.mode == "1" else "RGB")
    if isinstance(profile, bytes) or image.mode == "LAB":
        image = to_srgb(image, profile)
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}
    return image


def _turn(image: PILImage.Image) -> PILImage.Transpose | None:
    """What the EXIF orientation asks for, where it can be read: other damage in EXIF does not matter."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # struct.error, SyntaxError, ValueError, ...: whatever the bytes of EXIF may hold
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _white(image: PILImage.Image) -> tuple[float | None, bool]:
    """The value of white in a picture of more than 8 bits, where its file says it, and whether it is that of black."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    inverted = tags.get(_PHOTOMETRIC) == 0
    if image.mode == "F" or (not image.mode.startswith("I;16") and image.format != "PPM"):
        return None, inverted
    return 4095.0 if tags.get(_BITS_A_SAMPLE) in (12, (12,)) else 65535.0, inverted


def _to_8_bit(image: PILImage.Image, white: float | None, inverted: bool) -> PILImage.Image:
    """Grey of 16 bits, 32 bits or floats -> 8 bits. Where white is not known it is the smallest of 1 (floats), 255 and
    65535 that no pixel is above, or else the brightest pixel."""
    values_HW = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    if white is None:
        brightest = float(values_HW.max(initial=0.0))
        points = _WHITE_POINTS if image.mode == "F" else _WHITE_POINTS[1:]
        white = next((point for point in points if brightest <= point), brightest)
    grey_HW = np.rint(values_HW.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    if inverted:
        grey_HW = 255 - grey_HW
    hidden = image.info.get("transparency")
    if not isinstance(hidden, int):
        return PILImage.fromarray(grey_HW)
    alpha_HW = np.where(np.asarray(image) == hidden, 0, 255).astype(np.uint8)  # one grey value stands for "nothing"
    return PILImage.fromarray(np.stack([grey_HW, alpha_HW], axis=-1))


def to_square(image: PILImage.Image, resolution: int, fit: Literal["crop", "pad"] = "crop") -> PILImage.Image:
    """A picture of `rgb` in a square of so many pixels. `crop` centre-crops (answers and pre-training), `pad` keeps
    everything and fills the border with white (images in prompts; paper section 3.1). One that is such a square already
    stays as it is."""
    if fit == "crop":
        return ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.LANCZOS)
    longer = max(image.size)
    width, height = (max(1, round(side * resolution / longer)) for side in image.size)
    square = PILImage.new("RGB", (resolution, resolution), "white")
    square.paste(
        image.resize((width, height), PILImage.Resampling.LANCZOS),
        ((resolution - width) // 2, (resolution - height) // 2),
    )
    return square


def preprocess(image: PILImage.Image, resolution: int, fit: Literal["crop", "pad"] = "crop") -> Tensor:
    """Any picture as FloatTensor [3, resolution, resolution] in [-1, 1] (`rgb`, `to_square`)."""
    array_HWC = np.array(to_square(rgb(image), resolution, fit), dtype=np.uint8)
    import torch  # here: whoever only opens documents, or reads a specification, waits for no torch

    return torch.from_numpy(array_HWC).permute(2, 0, 1).float() / 127.5 - 1


def to_image(x_CHW: Tensor) -> PILImage.Image:
    """FloatTensor [3, H, W], clamped to [-1, 1] -> RGB image."""
    pixels_CHW = ((x_CHW.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return PILImage.fromarray(pixels_CHW.permute(1, 2, 0).cpu().numpy(), mode="RGB")
