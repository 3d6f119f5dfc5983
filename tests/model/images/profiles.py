"""ICC profiles made by hand, after the ICC's specification (version 2.4): of matrices, of greys and of inks."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# X, Y and Z of red, green and blue under D50, a row each, as the profiles of their makers have them.
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
_D50 = (0.9642, 1.0, 0.8249)


def of_matrix(colorants: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    tags = {name: _xyz(value) for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def of_grey(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def of_inks(color: Callable[[tuple[int, ...]], tuple[float, float, float]]) -> bytes:
    """CMYK; `color` gives L*, a* and b* of every combination of full inks, and what is between is interpolated."""
    identity = bytes(range(256))
    corners = b"".join(
        bytes((round(lightness * 2.55), round(a + 128), round(b + 128)))
        for lightness, a, b in map(color, itertools.product((0, 1), repeat=4))  # the last ink varies fastest
    )
    unit = struct.pack(">9i", *(65536 if n % 4 == 0 else 0 for n in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + unit + identity * 4 + corners + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": table})


def in_srgb(values: NDArray[np.uint8], colorants: tuple[tuple[float, ...], ...], gamma: float) -> NDArray[np.float64]:
    """What a profile of a matrix means, calculated without a library of colours: [..., 3] -> [..., 3], up to 255."""
    linear = (values / 255.0) ** gamma @ np.array(colorants) @ np.linalg.inv(np.array(SRGB))
    return encoded(linear.clip(0, 1))


def lab_in_srgb(lab: tuple[float, float, float]) -> NDArray[np.float64]:
    """CIELAB under D50 -> sRGB, up to 255."""
    y = (lab[0] + 16) / 116
    cubes = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * _D50
    return encoded((xyz @ np.linalg.inv(np.array(SRGB))).clip(0, 1))


def encoded(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light -> sRGB's curve (IEC 61966-2-1), up to 255."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    everything = {b"desc": _description(b"made by hand"), b"wtpt": _xyz(_D50), b"cprt": b"text" + bytes(4) + b"none\0"}
    everything |= tags
    place = 128 + 4 + 12 * len(everything)
    table, data = struct.pack(">I", len(everything)), b""
    for name, value in everything.items():
        table += name + struct.pack(">II", place + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = place + len(data)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, device, space, connection) + bytes(12) + b"acsp"
    return head.ljust(68, b"\0") + _xyz(_D50)[8:] + bytes(48) + table + data


def _xyz(value: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in value))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _description(words: bytes) -> bytes:
    return b"desc" + bytes(4) + struct.pack(">I", len(words) + 1) + words + bytes(1 + 8 + 3 + 67)
