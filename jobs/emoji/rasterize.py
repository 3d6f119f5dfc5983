"""Emoji sets as small pictures with Unicode's names: the shards in `sets/`, and sets of other styles or sizes.

    python -m calumma.jobs.emoji.rasterize --out sets                          # Noto and Fluent, by `npm pack`
    python -m calumma.jobs.emoji.rasterize --out sets --set Twemoji=@iconify-json/twemoji --size 256
    python -m calumma.jobs.emoji.rasterize --out sets --set Mine=~/svg --annotations ~/annotations.json

A set is a package of npm in Iconify's layout, such a package unpacked, or a folder of SVG files named by their code
points (`1f34e.svg`, `emoji_u1f34e.svg`). Names and keywords are CLDR's (`cldr-annotations-full`). SVG is drawn by resvg
(`pip install calumma[emoji]`), at four times the size, and averaged down on white.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from calumma.jobs.emoji.pictures import SKINS, Picture, write_set

SETS = {"Noto": "@iconify-json/noto", "Fluent": "@iconify-json/fluent-emoji-flat"}
ANNOTATIONS = "cldr-annotations-full"
FIRST_TONE, LAST_TONE = 0x1F3FB, 0x1F3FF  # Fitzpatrick modifiers
VARIATION = 0xFE0F  # "as a picture": names are given without it, and with it
QUALITY = 90  # of WebP: a third of the bytes of its lossless form
OVERSAMPLING = 4


class RasterizingError(RuntimeError):
    """A set or the annotations are not there, or not in a known layout."""


@dataclass(frozen=True)
class Drawing:
    """One SVG. `group`: Unicode's, where the set tells it."""

    points: tuple[int, ...]
    svg: str
    group: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calumma.jobs.emoji.rasterize", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--set", action="append", default=[], metavar="STYLE=SOURCE", help="npm package or folder")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--annotations", default=ANNOTATIONS, help="npm package, or its annotations.json")
    given = parser.parse_args(arguments)
    wanted = dict(one.partition("=")[::2] for one in given.set) or SETS
    try:
        with tempfile.TemporaryDirectory(prefix="calumma-emoji-") as folder:
            names = read_annotations(fetch(given.annotations, Path(folder)))
            for style, source in wanted.items():
                pictures = rasterized(style, read_drawings(fetch(source, Path(folder))), names, given.size)
                size = write_set(given.out / f"{style.lower()}.parquet", pictures)
                print(f"{style}: {len(pictures):,} pictures, {size:,} bytes")
    except RasterizingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(source: str, folder: Path) -> Path:
    """A file or folder as it is; else a package of npm, unpacked into `folder`. Raises RasterizingError."""
    place = Path(source).expanduser()
    if place.exists():
        return place
    try:
        done = subprocess.run(
            ["npm", "pack", source, "--silent"], cwd=folder, check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise RasterizingError(f"{source} is no folder here, and there is no npm to fetch it as a package") from error
    except subprocess.CalledProcessError as error:
        raise RasterizingError(f"npm has no package {source}: {error.stderr.strip()}") from error
    unpacked = folder / re.sub(r"\W+", "-", source)
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(unpacked, filter="data")
    return unpacked / "package"


def read_annotations(place: Path) -> dict[str, tuple[str, list[str]]]:
    """Characters -> (name, keywords), in English. Raises RasterizingError."""
    file = place if place.is_file() else place / "annotations" / "en" / "annotations.json"
    try:
        entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    except (OSError, ValueError, KeyError) as error:
        raise RasterizingError(f"{file} holds no annotations in CLDR's JSON: {error}") from error
    return {key: (one["tts"][0], one.get("default", [])) for key, one in entries.items() if one.get("tts")}


def read_drawings(place: Path) -> Iterator[Drawing]:
    """Every SVG of a set. Raises RasterizingError."""
    if (place / "icons.json").is_file():
        yield from _iconify(place)
        return
    files = sorted(place.glob("*.svg"))
    if not files:
        raise RasterizingError(f"{place} has neither icons.json, as packages of Iconify have, nor SVG files")
    for file in files:
        points = re.findall(r"[0-9a-f]{2,6}", re.sub(r"^emoji_u", "", file.stem.lower()))
        yield Drawing(tuple(int(point, 16) for point in points), file.read_text(encoding="utf-8"))


def _iconify(place: Path) -> Iterator[Drawing]:
    """https://iconify.design/docs/types/iconify-json.html: bodies by name, code points in chars.json."""
    icons = json.loads((place / "icons.json").read_text(encoding="utf-8"))
    groups = json.loads((place / "metadata.json").read_text(encoding="utf-8")).get("categories", {})
    group_of = {name: group for group, names in groups.items() for name in names}
    for points, name in json.loads((place / "chars.json").read_text(encoding="utf-8")).items():
        icon = icons["icons"].get(name)
        if icon is None:  # another name of one that is there
            continue
        box = [icon.get("left", 0), icon.get("top", 0)]
        box += [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
        head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {head} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        yield Drawing(tuple(int(point, 16) for point in points.split("-")), svg, group_of.get(name, ""))


def rasterized(
    style: str, drawings: Iterator[Drawing], names: dict[str, tuple[str, list[str]]], size: int
) -> list[Picture]:
    """Pictures of what has a name of its own, by name and skin. Left out: people whose gender is told (each has a
    neutral form as well), and pairs of people with a skin each."""
    found: dict[tuple[str, str], Picture] = {}
    for drawing in drawings:
        tones = [point for point in drawing.points if FIRST_TONE <= point <= LAST_TONE]
        bare = "".join(chr(p) for p in drawing.points if p not in (*tones, VARIATION))
        name, keywords = next((names[key] for key in (bare, bare + chr(VARIATION)) if key in names), ("", []))
        if not name or len(tones) > 1 or (tones and re.match(r"(wo)?m[ae]n\b", name)):
            continue
        skin = SKINS[tones[0] - FIRST_TONE] if tones else ""
        found[name, skin] = Picture(name, skin, style, drawing.group, tuple(keywords), _drawn(drawing.svg, size))
    return [found[key] for key in sorted(found)]


def _drawn(svg: str, size: int) -> bytes:
    import resvg_py

    side = size * OVERSAMPLING
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, background="#ffffff", skip_system_fonts=True)
    with PILImage.open(io.BytesIO(bytes(png))) as large:
        square = PILImage.new("RGB", (side, side), "white")  # wide drawings come out lower than they are wide
        square.paste(large.convert("RGB"), ((side - large.width) // 2, (side - large.height) // 2))
    buffer = io.BytesIO()
    square.resize((size, size), PILImage.Resampling.BOX).save(buffer, format="WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
