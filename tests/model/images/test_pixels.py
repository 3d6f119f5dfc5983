"""Pictures of every kind become upright RGB on white, and squares of pixels."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from PIL import ImageOps

from calumma.model.document import Image, UnreadableImage
from calumma.model.images import pixels, preprocess, rgb, to_image

RED, LIME, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def stored(image: PILImage.Image, kind: str, **options: object) -> Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image(buffer.getvalue())


def png(width: int, height: int, depth: int, color: int, rows: list[bytes], extra: bytes = b"") -> Image:
    """A PNG file by hand: Pillow writes neither 16-bit colours nor a transparent grey."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return Image(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# -- depth --


@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=9), kind=st.sampled_from(["PNG", "TIFF", "PPM"]))
@settings(deadline=None, max_examples=60)
def test_sixteen_bits_are_scaled_and_not_clipped(values: list[int], kind: str) -> None:
    deep = PILImage.fromarray(np.array([values], dtype=np.uint16))
    found = np.asarray(stored(deep, kind).open())[0]
    assert np.abs(found - np.array(values)[:, None] / 257).max() <= 0.51


def test_sixteen_bit_colour() -> None:
    row = struct.pack(">6H", 0, 32896, 65535, 65535, 257, 0)
    assert np.asarray(png(2, 1, 16, 2, [row]).open()).tolist() == [[[0, 128, 255], [255, 1, 0]]]


def test_one_grey_of_sixteen_bits_may_be_transparent() -> None:
    row = struct.pack(">3H", 0, 1000, 65535)
    image = png(3, 1, 16, 0, [row], chunk(b"tRNS", struct.pack(">H", 0)))
    assert np.asarray(image.open())[0, :, 0].tolist() == [255, 4, 255]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
        ([0.0, 51.0, 255.0], np.float32, [0, 51, 255]),
        ([-3.0, float("nan"), float("inf")], np.float32, [0, 0, 0]),
        ([0, 51, 255], np.int32, [0, 51, 255]),
        ([-5, 257, 65535], np.int32, [0, 1, 255]),
        ([0, 500_000, 2_000_000], np.int32, [0, 64, 255]),
    ],
)
def test_white_of_integers_and_floats_fits_their_brightest_value(
    values: list[float], dtype: type, expected: list[int]
) -> None:
    image = PILImage.fromarray(np.array([values], dtype=dtype))
    assert np.asarray(rgb(image))[0, :, 0].tolist() == expected


def tiff(width: int, bits: int, photometric: int, data: bytes) -> Image:
    """A grey TIFF of one row by hand: Pillow writes neither 12 bits nor white as zero."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    pixels = data + bytes(len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    return Image(head + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_twelve_bits_are_scaled() -> None:
    row = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in ((0, 2048), (4095, 1000)))
    assert np.asarray(tiff(4, 12, 1, row).open())[0, :, 0].tolist() == [0, 128, 255, 62]


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero(bits: int) -> None:
    values = np.array([0, 51, 255], np.uint8) if bits == 8 else np.array([0, 51 * 257, 65535], "<u2")
    assert np.asarray(tiff(3, bits, 0, values.tobytes()).open())[0, :, 0].tolist() == [255, 204, 0]


# -- colour --


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_white_is_white_in_every_mode(mode: str) -> None:
    start = PILImage.new("RGBA", (2, 2), "white")
    image = start.convert("LA" if mode == "La" else "CMYK" if mode == "CMYK" else "RGB" if mode == "PA" else start.mode)
    image = image.convert("P").convert("PA") if mode == "PA" else image
    image = image if image.mode == mode else (image.convert("RGB") if mode in ("YCbCr", "HSV") else image).convert(mode)
    assert image.mode == mode
    assert np.asarray(rgb(image)).tolist() == np.full((2, 2, 3), 255).tolist()


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    image = PILImage.new(mode, (2, 2), 0 if mode == "PA" else (0,) * len(PILImage.new(mode, (1, 1)).getbands()))
    assert rgb(image).getpixel((0, 0)) == WHITE


def test_half_transparent_red_lets_white_through() -> None:
    assert stored(PILImage.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG").open().getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_with_a_transparent_colour(kind: str) -> None:
    image = PILImage.new("P", (2, 1))
    image.putpalette([*RED, *LIME])
    image.putdata([0, 1])
    opened = stored(image, kind, transparency=1).open()
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_cmyk() -> None:
    red = PILImage.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert rgb(red).getpixel((0, 0)) == RED
    assert np.abs(np.array(stored(red, "JPEG", quality=95).open().getpixel((8, 8))) - RED).max() <= 3


# -- orientation, frames --


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("decoded", [False, True])
def test_images_stand_upright(orientation: int, decoded: bool) -> None:
    upright = PILImage.new("RGB", (3, 2), "white")
    upright.putpixel((0, 0), RED)
    upright.putpixel((2, 0), LIME)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes what exif_transpose will do
    lying = upright if orientation == 1 else upright.transpose(PILImage.Transpose(turns[orientation]))
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    image = stored(lying, "PNG", exif=exif)
    if decoded:
        image = Image(PILImage.open(io.BytesIO(image.data)))  # type: ignore[arg-type]
    opened = image.open()
    assert opened.tobytes() == upright.tobytes()
    assert rgb(opened).tobytes() == upright.tobytes()  # turned once, however often it is read


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [PILImage.new("RGB", (8, 8), color) for color in (RED, LIME, (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(PILImage.open(io.BytesIO(image.data)), "n_frames", 1) == 3  # type: ignore[arg-type]
    assert image.open().getcolors() == [(64, RED)]


# -- refusals --


@pytest.mark.parametrize("side", [9000, 20_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(side, side, 1, 0, [bytes(side // 8)])  # one row of data would do to make a decoder allocate all
    loaded: list[int] = []
    monkeypatch.setattr(PILImage.Image, "load", lambda self: loaded.append(1))
    with pytest.raises(UnreadableImage, match="pixels"):
        bomb.open()
    assert not loaded


def test_a_bomb_is_refused_as_a_picture_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "MAX_PIXELS", 15)
    with pytest.raises(UnreadableImage, match="4x4 pixels are more than the 15 allowed"):
        Image(PILImage.new("RGB", (4, 4))).open()


@pytest.mark.parametrize("data", [b"", b"no image", stored(PILImage.new("RGB", (99, 99)), "PNG").data[:60]])  # type: ignore[index]
def test_broken_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match="not a readable image"):
        Image(data).open()


# -- to pixels and back --


@given(width=st.integers(1, 300), height=st.integers(1, 300), resolution=st.sampled_from([4, 16, 33]))
@settings(deadline=None, max_examples=60)
def test_any_shape_becomes_a_square(width: int, height: int, resolution: int) -> None:
    image = PILImage.new("RGB", (width, height), RED)
    cropped = preprocess(image, resolution)
    padded = preprocess(image, resolution, "pad")
    assert cropped.shape == padded.shape == (3, resolution, resolution)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    assert torch.equal(cropped, red.expand_as(cropped))  # a crop is filled from edge to edge
    inked = (padded == red).all(0)
    assert (inked | (padded == 1).all(0)).all()  # padded: the picture, or white
    rows, columns = int(inked.any(1).sum()), int(inked.any(0).sum())
    assert max(rows, columns) == resolution
    assert abs(rows / columns - height / width) <= (1 + height / width) / min(rows, columns)
    assert int(inked.sum()) == rows * columns


def test_a_crop_takes_the_middle_and_padding_keeps_the_ends() -> None:
    image = PILImage.new("RGB", (30, 10), "black")
    image.paste(RED, (0, 0, 10, 10))
    image.paste(LIME, (20, 0, 30, 10))
    assert preprocess(image, 10).max() == -1
    kept = to_image(preprocess(image, 30, "pad"))
    assert [kept.getpixel((x, 15)) for x in (1, 15, 28)] == [RED, (0, 0, 0), LIME]
    assert kept.getpixel((15, 2)) == WHITE


@given(seed=st.integers(0, 1000), size=st.integers(1, 20))
@settings(deadline=None, max_examples=20)
def test_pixels_round_trip(seed: int, size: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = PILImage.fromarray(array)
    pixels = preprocess(image, size)
    assert -1 <= pixels.min() <= pixels.max() <= 1
    assert to_image(pixels).tobytes() == image.tobytes()


def test_values_outside_the_range_are_clamped() -> None:
    assert to_image(torch.tensor([-7.0, 0.0, 9.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)


def test_downscaling_is_the_public_releases_filter() -> None:
    """Lanczos, as Meta's and Hugging Face's preprocessing of Chameleon."""
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    expected = image.resize((16, 16), PILImage.Resampling.LANCZOS)
    assert to_image(preprocess(image, 16)).tobytes() == expected.tobytes()
    assert to_image(preprocess(ImageOps.mirror(image), 16, "pad")).size == (16, 16)


def test_floats_of_a_pfm_are_of_0_to_1(tmp_path: Path) -> None:
    PILImage.new("F", (2, 2), 0.5).save(tmp_path / "a.pfm")
    with PILImage.open(tmp_path / "a.pfm") as image:
        assert rgb(image).getpixel((0, 0)) == (128, 128, 128)
