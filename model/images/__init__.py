"""Pictures: what bytes are, bytes to upright sRGB, sRGB to the tokenizer's square of pixels, and back."""

from calumma.model.images.data_urls import from_base64
from calumma.model.images.decoding import DecodedImage, UnreadableImage, decode, is_no_image, open_header, suffixes
from calumma.model.images.kinds import kind_of
from calumma.model.images.pixels import MAX_PIXELS, preprocess, rgb, to_image, to_square

__all__ = [
    "MAX_PIXELS",
    "DecodedImage",
    "UnreadableImage",
    "decode",
    "from_base64",
    "is_no_image",
    "kind_of",
    "open_header",
    "preprocess",
    "rgb",
    "suffixes",
    "to_image",
    "to_square",
]
