"""Colours come out as their ICC profile means them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageCms

from calumma.model.document import Image

from . import profiles

COLORS = np.random.default_rng(7).integers(0, 256, (16, 16, 3), dtype=np.uint8)
WIDE = {
    "Display P3": (profiles.DISPLAY_P3, 2.2),
    "Adobe RGB": (profiles.ADOBE_RGB, 2.19921875),
    "linear": (profiles.SRGB, 1.0),
}


def stored(image: PILImage.Image, kind: str, **options: object) -> Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image(buffer.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
@pytest.mark.parametrize("space", WIDE)
def test_wide_colours_are_those_that_the_profile_means(space: str, kind: str) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
    lossless = {"lossless": True} if kind == "WEBP" else options.get(kind, {})
    image = stored(PILImage.fromarray(COLORS), kind, icc_profile=profiles.of_matrix(*WIDE[space]), **lossless)
    with PILImage.open(io.BytesIO(image.data)) as opened:  # type: ignore[arg-type]
        values = np.asarray(opened.convert("RGB"))
    difference = np.abs(np.asarray(image.open()) - profiles.in_srgb(values, *WIDE[space]))
    assert difference.max() <= 2, "of 255, by a calculation that uses no library of colours"
    assert np.abs(np.asarray(image.open()).astype(int) - values).max() > 10, "and the profile does change them"


def test_colours_that_are_srgb_stay_as_they_are() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert stored(PILImage.fromarray(COLORS), "PNG", icc_profile=profile).open().tobytes() == COLORS.tobytes()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16"])
def test_greys(mode: str) -> None:
    values = np.arange(256, dtype=np.uint8)[None]
    image = {
        "L": PILImage.fromarray(values),
        "LA": PILImage.merge("LA", [PILImage.fromarray(values), PILImage.new("L", (256, 1), 255)]),
        "1": PILImage.fromarray(np.where(values > 127, 255, 0).astype(np.uint8)).convert("1"),
        "I;16": PILImage.fromarray(values.astype(np.uint16) * 257),
    }[mode]
    expected = profiles.encoded(np.asarray(image.convert("L") if mode != "I;16" else values)[0] / 255.0)
    found = np.asarray(stored(image, "PNG", icc_profile=profiles.of_grey(1.0)).open())[0]
    assert np.abs(found - expected[:, None]).max() <= 2


def test_palettes_and_transparency_keep_their_places() -> None:
    profile = profiles.of_matrix(profiles.ADOBE_RGB, 2.2)
    green = profiles.in_srgb(np.array([90, 200, 60], dtype=np.uint8), profiles.ADOBE_RGB, 2.2)
    palette = PILImage.new("P", (2, 1))
    palette.putpalette([90, 200, 60, 1, 2, 3])
    palette.putdata([0, 1])
    layer = PILImage.new("RGBA", (2, 1), (90, 200, 60, 255))
    layer.putpixel((1, 0), (1, 2, 3, 0))
    for image in (
        stored(palette, "PNG", transparency=1, icc_profile=profile),
        stored(layer, "PNG", icc_profile=profile),
    ):
        found = np.asarray(image.open())[0]
        assert np.abs(found[0] - green).max() <= 2
        assert found[1].tolist() == [255, 255, 255]


def test_inks_are_those_of_the_press() -> None:
    """White paper, and cyan as it is printed: darker than a screen's, which is what comes without a profile."""
    cyan = (55.0, -37.0, -50.0)

    def color(inks: tuple[int, ...]) -> tuple[float, float, float]:
        return cyan if inks == (1, 0, 0, 0) else (100.0 * (1 - max(inks)), 0.0, 0.0)

    inks = PILImage.new("CMYK", (32, 16), (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (0, 0, 16, 16))
    for kind in ("JPEG", "TIFF"):
        options = {"quality": 95} if kind == "JPEG" else {}
        picture = stored(inks, kind, icc_profile=profiles.of_inks(color), **options).open()
        assert np.abs(np.array(picture.getpixel((4, 8))) - profiles.lab_in_srgb(cyan)).max() <= 6
        assert np.abs(np.array(picture.getpixel((28, 8))) - 255).max() <= 3
    assert stored(inks, "TIFF").open().getpixel((4, 8)) == (0, 255, 255)


def test_cielab() -> None:
    rgb = PILImage.fromarray(COLORS)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    found = np.asarray(stored(ImageCms.applyTransform(rgb, to_lab), "TIFF").open())  # type: ignore[arg-type]
    assert np.abs(found.astype(int) - COLORS).mean() < 4, "eight bits of L*a*b* are coarse"


@pytest.mark.parametrize(
    "profile", [b"", b"no profile", profiles.of_matrix(profiles.ADOBE_RGB, 2.2)[:200], profiles.of_grey(1.0)]
)
def test_a_profile_that_is_damaged_or_of_other_channels_is_as_good_as_none(profile: bytes) -> None:
    assert stored(PILImage.fromarray(COLORS), "PNG", icc_profile=profile).open().tobytes() == COLORS.tobytes()


def test_a_picture_is_converted_once() -> None:
    image = stored(PILImage.fromarray(COLORS), "PNG", icc_profile=profiles.of_matrix(profiles.ADOBE_RGB, 2.2))
    assert Image(image.open()).open().tobytes() == image.open().tobytes()
