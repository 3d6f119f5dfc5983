"""A picture that is asked about again is coded once: by what it is, for those of the same salt."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence

from PIL import Image as PILImage

from calumma.model.document import Image
from calumma.serve.replica.image_codes import ImageCodeCache


class Coder:
    """Codes of an image: its first pixel. Counts what it is given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    async def encode(self, images: Sequence[Image]) -> list[list[int]]:
        self.given.append(len(images))
        return [list(image.open().tobytes()[:3]) for image in images]


def picture(colour: str, role: str = "user", as_file: bool = False) -> Image:
    plain = PILImage.new("RGB", (4, 4), colour)
    if not as_file:
        return Image(plain, role=role)  # type: ignore[arg-type]
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    return Image(buffer.getvalue(), role=role)  # type: ignore[arg-type]


def test_each_picture_is_coded_once_for_a_salt() -> None:
    cache, coder = ImageCodeCache(), Coder()

    def codes(salt: bytes, *images: Image) -> list[list[int]]:
        return asyncio.run(cache.encode(images, salt, coder.encode))

    red, blue = [255, 0, 0], [0, 0, 255]
    assert codes(b"", picture("red"), picture("blue"), picture("red")) == [red, blue, red]
    assert codes(b"", picture("blue"), picture("red")) == [blue, red]
    assert coder.given == [2]
    assert codes(b"other", picture("red")) == [red]
    assert codes(b"", picture("red", "assistant")) == [red], "it is cropped, not padded"
    assert codes(b"", picture("red", as_file=True), picture("red", as_file=True)) == [red, red]
    assert coder.given == [2, 1, 1, 1]
    assert (cache.coded, cache.known) == (5, 4)


def test_the_longest_unused_are_forgotten() -> None:
    cache, coder = ImageCodeCache(most=2), Coder()
    for colour in ("red", "blue", "red", "green", "red", "blue"):
        asyncio.run(cache.encode([picture(colour)], b"", coder.encode))
    assert (cache.coded, cache.known) == (4, 2)
    assert asyncio.run(cache.encode([], b"", coder.encode)) == []


def test_what_cannot_be_read_is_not_remembered() -> None:
    cache, coder = ImageCodeCache(), Coder()
    for _ in range(2):
        try:
            asyncio.run(cache.encode([Image(b"none", role="user")], b"", coder.encode))
        except ValueError:
            continue
        raise AssertionError("an image that is none was coded")
    assert coder.given == [1, 1]
