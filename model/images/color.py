"""Colours to sRGB: by the picture's own ICC profile, as browsers do, and CIELAB without one.

A profile that is damaged, or that is of other channels than the picture, is as good as none.
"""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

if TYPE_CHECKING:
    from PIL.ImageCms import ImageCmsTransform

_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile -> mode it applies to
_SAME = 2  # of 255: a profile that changes no colour by more is sRGB, whatever it is called
_PROFILES = 16  # of different pictures, kept ready; one of CMYK may have two megabytes


def to_srgb(image: PILImage.Image, profile: bytes | None) -> PILImage.Image:
    """A picture of 8 bits a channel (L, RGB, CMYK or LAB, each with or without alpha) as RGB or RGBA."""
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colors = image.convert(image.mode[:-1]) if alpha is not None else image
    found = _transform_of(profile) if profile else None
    if colors.mode == "LAB" and found is None:
        found = _transform_of(None)
    if found is not None and found[0] == "RGB" and colors.mode == "L":
        colors = colors.convert("RGB")  # greys with the profile of colours: of equal red, green and blue
    if found is not None and found[0] == colors.mode:
        colors = found[1].apply(colors)
    colors = colors.convert("RGB")
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


@functools.lru_cache(maxsize=_PROFILES)
def _transform_of(profile: bytes | None) -> tuple[str, ImageCmsTransform] | None:
    """The mode that a profile applies to (None: CIELAB) and what it does, or None where it is unusable or sRGB."""
    from PIL import ImageCms

    try:
        lab = ImageCms.createProfile("LAB")
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile is not None else lab)
        mode = _SPACES.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None
        # Greys without lcms's table of a few points, which is out by six of 255 where a curve is steep.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # what ImageCms raises for damaged profiles
        return None
    if mode in ("L", "RGB"):
        colors = _lattice(mode)
        change = np.asarray(transform.apply(colors)).astype(int) - np.asarray(colors.convert("RGB"))
        if np.abs(change).max() <= _SAME:
            return None
    return mode, transform


def _lattice(mode: str) -> PILImage.Image:
    """Colours from the whole space, as a picture."""
    if mode == "L":
        return PILImage.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return PILImage.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3))
