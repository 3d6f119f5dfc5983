"""Encoded pictures to pixels: which formats are decoded, and what of damage is forgiven, as browsers do.

Only the formats in `FORMATS` are decoded, whatever else Pillow could open: a picture comes from anybody, and each
decoder is a way in (PostScript is a programming language).
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from calumma.model.images.kinds import READ, kind_of
from calumma.model.images.pixels import rgb

FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "JPEG2000", "PPM", "ICO", "TGA", "PCX", "QOI",
    "SGI", "SUN",
)  # fmt: skip
JPEG_END = b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG that say how it looks; all others are words, dates and the like.
_PNG_CHUNKS = frozenset(
    (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"sBIT", b"eXIf")
)
_DECODED = {  # how `kind_of` names what is decoded
    "a JPEG p": "JPEG",
    "a PNG p": "PNG",
    "a WebP p": "WEBP",
    "an AVIF p": "AVIF",
    "a GIF p": "GIF",
    "a TIFF p": "TIFF",
    "a BMP p": "BMP",
    "a JPEG 2000 p": "JPEG2000",
    "a PPM p": "PPM",
}
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


class UnreadableImage(ValueError):
    """The bytes are not an image that can be decoded; the message says why."""


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB picture. `mended`: what of its file was damaged and forgiven; `frames`: of an animation, or pages
    of a TIFF, of which this is the first; `format`: as Pillow calls it."""

    image: PILImage.Image
    mended: str | None = None
    frames: int = 1
    format: str = ""


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that are decoded, in lower case, with their dots."""
    PILImage.init()
    formats = {*FORMATS, "MPO"}  # an MPO is a JPEG with further pictures behind it
    return frozenset(suffix for suffix, form in PILImage.EXTENSION.items() if form in formats)


def decode(data: bytes, strict: bool = False, formats: tuple[str, ...] = FORMATS) -> DecodedImage:
    """Encoded bytes -> upright RGB (`rgb`).

    A JPEG without its end, and a PNG with damaged or very large words in it, are read unless `strict`. formats: those
    that are decoded, of FORMATS. Raises UnreadableImage.
    """
    try:
        return _decode(data, None, formats)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        failure = error
    for mended in _mended(data):
        if strict:
            break
        try:
            return _decode(*mended, formats)
        except Exception as error:
            failure = error
    raise UnreadableImage(f"not a readable image: {_explained(data, failure, formats)}") from failure


def open_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> PILImage.Image:
    """The picture with its size and mode, not decoded yet. Raises UnreadableImage."""
    try:
        return PILImage.open(io.BytesIO(data), formats=formats)
    except Exception as error:
        failure = error
    for mended, _ in _mended(data):
        try:
            return PILImage.open(io.BytesIO(mended), formats=formats)
        except Exception as error:
            failure = error
    raise UnreadableImage(f"not a readable image: {_explained(data, failure, formats)}") from failure


def is_no_image(data: bytes) -> bool:
    """Whether bytes are something else, such as the page that a download got; damaged images are images."""
    if kind_of(data).startswith(tuple(_DECODED)):
        return False
    try:
        open_header(data).close()
    except UnreadableImage:
        return True
    return False


def _decode(data: bytes, mended: str | None, formats: tuple[str, ...]) -> DecodedImage:
    with PILImage.open(io.BytesIO(data), formats=formats) as opened:
        picture = rgb(opened)
        try:
            frames = int(getattr(opened, "n_frames", 1))
        except Exception:  # a later frame is damaged; the first is all that is asked for
            frames = 1
    return DecodedImage(picture, mended, frames, opened.format or "")


def _explained(data: bytes, error: Exception, formats: tuple[str, ...]) -> str:
    """What the bytes are, and why they cannot be decoded: without addresses, so that equal bytes say the same."""
    kind = kind_of(data)
    if not isinstance(error, UnidentifiedImageError):
        reason = _ADDRESS.sub("the data", str(error)) or type(error).__name__
        return f"{kind} that cannot be decoded: {reason}"
    decoded = tuple(begin for begin, form in _DECODED.items() if form in formats)
    if kind.startswith(decoded):
        return f"{kind} that is damaged, cut or of a sort that is not decoded"
    if kind.endswith("picture") or kind.startswith(("a camera", "an SVG")):
        return f"{kind}, which is not decoded; convert it to {READ if formats == FORMATS else _listed(formats)}"
    return f"{kind}, no image"


def _listed(formats: tuple[str, ...]) -> str:
    *others, last = ("WebP" if form == "WEBP" else form for form in formats)
    return f"{', '.join(others)} or {last}"


# -- damage that is forgiven -------------------------------------------------------------------------------------------


def _mended(data: bytes) -> Iterator[tuple[bytes, str]]:
    """The bytes without their damage, and what it was: what keeps most of them first."""
    if data.startswith(b"\xff\xd8\xff") and (mended := _with_jpeg_end(data)) is not None:
        yield mended
    if data.startswith(PNG_SIGNATURE):
        for kept in (_PNG_CHUNKS, frozenset((b"tRNS",)), frozenset[bytes]()):
            if (mended := _without_words(data, kept)) is not None:
                yield mended


def _with_jpeg_end(data: bytes) -> tuple[bytes, str] | None:
    """A JPEG that ends inside of its pixels, ended there: what is missing is grey, as in browsers."""
    position, scans = 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a filling byte
            position += 1
            continue
        if marker == 0xD9:
            return None
        after = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if after > len(data):
            break
        position = after
        if marker == 0xDA:  # a scan: up to the next marker that is none of its own
            scans += 1
            while (position := data.find(b"\xff", position)) >= 0:
                following = data[position + 1 : position + 2]
                if following and following != b"\xff" and following != b"\0" and not b"\xd0" <= following <= b"\xd7":
                    break
                position += 1 if following == b"\xff" or not following else 2
            if position < 0:
                return data + JPEG_END, "a JPEG without its end"
    return (data[:position] + JPEG_END, "a JPEG without its end") if scans else None


def _without_words(data: bytes, kept: frozenset[bytes]) -> tuple[bytes, str] | None:
    """A PNG with what it cannot be without and, of the rest, what is intact and to be kept."""
    from zlib import crc32

    parts, position, left_out = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        name, chunk = data[position + 4 : position + 8], data[position:end]
        needed = name[:1].isupper()
        intact = len(chunk) == end - position and crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if needed or (intact and name in kept):
            parts.append(chunk)
        else:
            left_out = True
        position = end
    return (b"".join(parts), "a PNG with damaged or very large text") if left_out else None
