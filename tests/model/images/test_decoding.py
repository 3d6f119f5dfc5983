"""What is decoded, what of damage is forgiven, and what is said of the rest."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model.document import Image, UnreadableImage
from calumma.model.images import decode, from_base64, kind_of, open_header, suffixes

PHOTO = PILImage.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def stored(kind: str, image: PILImage.Image = PHOTO, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, name: bytes, data: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk before its pixels."""
    crc = zlib.crc32(name + data) if crc is None else crc
    return png[:33] + struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc) + png[33:]


# -- damage --


@pytest.mark.parametrize("progressive", [False, True])
@given(share=st.floats(0.45, 1.0))
@settings(deadline=None, max_examples=40)
def test_a_jpeg_without_its_end_is_read_as_far_as_it_goes(progressive: bool, share: float) -> None:
    whole = stored("JPEG", quality=90, progressive=progressive)
    cut = whole[: min(len(whole) - 1, max(700, int(share * len(whole))))]
    found = decode(cut)
    assert found.image.size == PHOTO.size
    assert found.mended == ("a JPEG without its end" if len(cut) < len(whole) - 1 else found.mended)
    if not progressive and share > 0.6:
        assert np.array_equal(np.asarray(found.image)[:8], np.asarray(decode(whole).image)[:8]), (
            "the rows that are there"
        )
    if len(cut) < len(whole) - 2:
        with pytest.raises(UnreadableImage, match=r"a JPEG picture that cannot be decoded: .*truncated"):
            decode(cut, strict=True)


@pytest.mark.parametrize("cut", [3, 20, 200])
def test_a_jpeg_without_pixels_is_refused(cut: int) -> None:
    with pytest.raises(UnreadableImage, match="a JPEG picture"):
        decode(stored("JPEG")[:cut])


WORDS = zlib.compress(b"x" * (2 << 20))


@pytest.mark.parametrize(
    "png",
    [
        with_chunk(stored("PNG"), b"tEXt", b"Comment\0words", crc=7),
        with_chunk(stored("PNG"), b"zTXt", b"Comment\0\0" + WORDS),
        with_chunk(stored("PNG"), b"zTXt", b"Comment\0\0not zlib", crc=1),
        with_chunk(stored("PNG"), b"iTXt", b"Comment\0\1\0\0\0" + WORDS),
        with_chunk(stored("PNG"), b"iCCP", b"name\0\0damaged", crc=9),
        with_chunk(stored("PNG"), b"iCCP", b"name\0\0" + WORDS),
        with_chunk(stored("PNG"), b"gAMA", b"\0"),
        with_chunk(stored("PNG"), b"tRNS", b"\0"),
        with_chunk(stored("PNG"), b"tIME", b"\0", crc=9),
    ],
)
def test_damage_and_size_of_what_is_no_pixel_of_a_png_does_not_matter(png: bytes) -> None:
    found = decode(png)
    assert found.image.tobytes() == PHOTO.tobytes()
    assert found.mended == "a PNG with damaged or very large text"
    assert open_header(png).size == PHOTO.size
    with pytest.raises(UnreadableImage, match="not a readable image: a PNG picture"):
        decode(png, strict=True)


@given(place=st.integers(33, 3000), bits=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_a_png_with_damaged_pixels_is_never_mended_into_others(place: int, bits: int) -> None:
    whole = bytearray(stored("PNG", PHOTO.crop((0, 0, 16, 16))))
    whole[place % (len(whole) - 45) + 41] ^= bits
    try:
        found = decode(bytes(whole))
    except UnreadableImage:
        return
    assert found.mended is None


def test_the_transparency_of_a_png_outlives_damage_beside_it() -> None:
    clear = PILImage.new("P", (4, 4))
    clear.putpalette([9, 9, 9] * 256)
    plain = stored("PNG", clear, transparency=0)
    assert decode(with_chunk(plain, b"gAMA", b"\0")).image.tobytes() == decode(plain).image.tobytes()


@pytest.mark.parametrize(
    "text",
    [
        b"aGVsbG8=",
        b"aGVsbG8",
        b"aGVs\r\n bG8=",
        b"aGVsbG8%3D",
    ],
)
def test_base64_is_read_as_in_browsers(text: bytes) -> None:
    assert from_base64(text) == b"hello"


@pytest.mark.parametrize("text", [b"aGVsbG8==", b"aGVsb", b"aGVs_G8", b"!"])
def test_what_is_no_base64_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_base64(text)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"nothing of the kind"]
)
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    assert decode(stored("JPEG", exif=exif)).image.size == PHOTO.size


def test_orientation_is_applied_where_exif_cannot_be_written_again() -> None:
    """A word where EXIF has a ratio: common in photographs, and Pillow refuses to write it."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    assert decode(stored("JPEG", exif=exif)).image.size == (48, 64)


# -- formats --


@pytest.mark.parametrize(
    "suffix", sorted({".avif", ".jfif", ".jpe", ".jp2", ".ppm", ".tif", ".webp", ".bmp", ".ico", ".tga", ".qoi"})
)
def test_files_with_pillows_suffixes_are_read(suffix: str) -> None:
    assert suffix in suffixes()
    form = PILImage.registered_extensions()[suffix]
    assert decode(stored(form, PHOTO.crop((0, 0, 32, 32)))).image.size == (32, 32)


def test_what_runs_programs_is_no_picture() -> None:
    assert not suffixes() & {".eps", ".ps", ".pdf", ".wmf", ".h5", ".mpg", ".fits"}
    with pytest.raises(UnreadableImage, match="a PostScript document, no image"):
        decode(stored("EPS"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_frames_are_counted(kind: str) -> None:
    frames = [PILImage.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    found = decode(stored(kind, frames[0], save_all=True, append_images=frames[1:]))
    assert (found.frames, found.format) == (3, kind)
    assert decode(stored(kind)).frames == 1


# -- what bytes are --

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "nothing (0 bytes), no image"),
        (bytes(100), "zeros, no image"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "an HTML page, no image"),
        (b"\xef\xbb\xbf  <HTML>", "an HTML page, no image"),
        ("<html>größer</html>".encode("utf-16"), "an HTML page, no image"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing, which is not decoded"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document, no image"),
        (b'{"error": "expired"}', "JSON, no image"),
        (b"404: Not Found", "text, no image"),
        (b"https://example.org/a.jpg", "an address, no image"),
        (b"/9j/4AAQSkZJRgABAQ", "a picture in base64, as text, no image"),
        (b"data:image/png;base64,iVBO", "the data URL of a picture, as text, no image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (HEIC, "a HEIC picture, which is not decoded; convert it to JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "an MP4 film, no image"),
        (b"%PDF-1.7", "a PDF document, no image"),
        (b"PK\x03\x04\x14\0", "a ZIP archive, no image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture, which is not decoded"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "what macOS keeps beside a file (AppleDouble), no image"),
        (b"8BPS\0\1", "a Photoshop document, no image"),
        (b"\x89PNG\r\n\x1a\n", "a PNG picture that is damaged, cut or of a sort that is not decoded"),
        (b"\xde\xad\xbe\xef\0\1\2\3\4", "unknown data that begins with de ad be ef 00 01 02 03, no image"),
    ],
)
def test_messages_say_what_the_bytes_are(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableImage) as error:
        Image(data).open()
    assert str(error.value).startswith(f"not a readable image: {message}")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_pictures_are_told_by_their_first_bytes(kind: str) -> None:
    assert kind_of(stored(kind)).removesuffix(" picture").split(" ", 1)[1].replace(" ", "").upper() == kind


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_picture_or_refused_with_the_same_words(data: bytes) -> None:
    said = []
    for _ in range(2):
        try:
            decode(data)
        except UnreadableImage as error:
            said.append(str(error))
    assert len(set(said)) <= 1
    assert not any("0x" in words for words in said)


def test_other_processes_say_the_same() -> None:
    program = (
        "from calumma.model.images import decode\n"
        "for data in (b'<html>', b'\\x89PNG\\r\\n\\x1a\\n', b'\\xff\\xd8\\xff\\xe0abc', bytes(9), b'II*\\0abcdefgh'):\n"
        "    try: decode(data)\n"
        "    except ValueError as error: print(error)"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            cwd=Path.cwd(),
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1
    assert len(said.pop().splitlines()) == 5
