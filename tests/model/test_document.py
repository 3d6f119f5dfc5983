"""Segments of documents: images of every kind, rows, layout."""

from __future__ import annotations

import io

import pytest
from PIL import Image as PILImage

from calumma.model import Document, Image, Text
from calumma.model.document import UnreadableImage, without_layout


def test_rows_round_trip() -> None:
    png = Image(PILImage.new("RGB", (4, 4), "red"), caption="red").png()
    document = Document((Image(png, "red", "user"), Text("x", "assistant")), source="s", license="MIT", url="u")
    assert Document.from_row(document.to_row()) == document


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16"])
def test_every_colour_mode_opens_as_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    PILImage.new(mode, (8, 6)).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    opened = Image(buffer.getvalue()).open()
    assert (opened.mode, opened.size) == ("RGB", (8, 6))


def test_transparency_becomes_white_and_exif_is_obeyed() -> None:
    buffer = io.BytesIO()
    PILImage.new("RGBA", (2, 2), (0, 0, 0, 0)).save(buffer, format="PNG")
    assert Image(buffer.getvalue()).open().getpixel((0, 0)) == (255, 255, 255)
    buffer, exif = io.BytesIO(), PILImage.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    PILImage.new("RGB", (8, 4)).save(buffer, format="JPEG", exif=exif)
    assert Image(buffer.getvalue()).open().size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_bytes_are_said_to_be_so(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        Image(data).open()


def test_decompression_bombs_are_refused() -> None:
    buffer = io.BytesIO()
    PILImage.new("1", (9000, 9000)).save(buffer, format="PNG")
    with pytest.raises(UnreadableImage, match="more than"):
        Image(buffer.getvalue()).open()


def test_white_space_beside_an_image_is_layout() -> None:
    picture = Image(PILImage.new("RGB", (4, 4)))
    trimmed = without_layout([Text(" a "), picture, Text(" \n"), picture, Text("\tb c "), Text(" d", "user")])
    assert trimmed == (Text(" a"), picture, picture, Text("b c "), Text(" d", "user"))
    assert without_layout([Image(picture.data, role="user"), Text(" x", "assistant")])[1] == Text(" x", "assistant")
