"""Frames of images: the first is the image; a TIFF, GIF, WebP, PNG, AVIF or JPEG (MPO) may have more."""

from __future__ import annotations

import io

from PIL import Image as PILImage

MPO_HEAD = 1 << 17  # bytes of a JPEG within which it says that it has further pictures: behind 64 kB of EXIF


def may_have_frames(data: bytes) -> bool:
    """Whether an image's first bytes say that it may have several: the others need not be opened."""
    return (
        data[:4] in (b"GIF8", b"II*\0", b"MM\0*")
        or (data[:4] == b"RIFF" and data[12:16] == b"VP8X" and bool(data[20:21][0] & 2 if len(data) > 20 else 0))
        or (data[:4] == b"\x89PNG" and b"acTL" in data[:128])
        or (data[4:8] == b"ftyp" and b"avis" in data[8:64])
        or (data[:3] == b"\xff\xd8\xff" and data.find(b"MPF\0", 0, MPO_HEAD) >= 0)
    )


def frame_count(data: bytes) -> int:
    """How many frames an image has; 1 for what is no image."""
    if not may_have_frames(data):
        return 1
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return 1


def frames(data: bytes) -> list[bytes]:
    """The frames of an image, as images; of one frame the image as it is."""
    if frame_count(data) == 1:
        return [data]
    found = []
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                found.append(buffer.getvalue())
    except Exception:  # as above, at a damaged frame
        return found or [data]
    return found
