"""Emoji as pictures: what each shows, in which skin and style, read from the shards in `sets/` or from others.

Every use of a picture goes through `split`: a combination (this thing in that style; this hand with that skin in that
style) belongs to training or is held out, and every part of a held-out one is trained in other combinations.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from calumma.platform.specification import SpecificationError

SKINS = ("light", "medium-light", "medium", "medium-dark", "dark")
LICENSES = {"Noto": "Apache-2.0", "Fluent": "MIT"}
SEPARATOR = " | "
COLUMNS = ("thing", "skin", "group", "keywords", "picture")


@dataclass(frozen=True)
class Picture:
    """One picture. `skin`: one of SKINS, or "" for the usual form. `encoded`: a file Pillow reads, square, on white."""

    thing: str
    skin: str
    style: str
    group: str
    keywords: tuple[str, ...]
    encoded: bytes

    @property
    def word(self) -> str:
        """What it shows, as labels say it: `SEPARATOR` stands between its thing, its skin and its style."""
        return SEPARATOR.join((self.thing, self.skin or "usual", self.style))

    @property
    def phrase(self) -> str:
        """`red apple`, `waving hand with dark skin`."""
        return f"{self.thing} with {self.skin} skin" if self.skin else self.thing

    @property
    def name(self) -> str:
        """A key of files."""
        return "-".join(self.word.replace("|", "").lower().replace(".", "").split())

    def picture(self) -> PILImage.Image:
        return PILImage.open(io.BytesIO(self.encoded)).convert("RGB")

    def png(self) -> bytes:
        return _png(self.picture())

    def moved(self, random: np.random.Generator) -> Picture:
        """The same, turned by up to 10 degrees, 0.8 to 1 times as large, shifted by up to a twentieth: another picture
        of it."""
        angle, scale = float(random.uniform(-10, 10)), float(random.uniform(0.8, 1))
        whole = self.picture()
        side = whole.width
        right, down = (int(s) for s in np.rint(random.uniform(-0.05, 0.05, 2) * side))
        turned = whole.rotate(angle, PILImage.Resampling.BICUBIC, fillcolor="white")
        small = turned.resize((round(side * scale),) * 2, PILImage.Resampling.LANCZOS)
        ground = PILImage.new("RGB", whole.size, "white")
        margin = (side - small.width) // 2
        ground.paste(small, (margin + right, margin + down))
        return Picture(self.thing, self.skin, self.style, self.group, self.keywords, _png(ground))


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def write_set(file: Path, pictures: Sequence[Picture]) -> int:
    """One style as a Parquet shard; its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    [style] = {picture.style for picture in pictures}
    rows = [dict(zip(COLUMNS, (p.thing, p.skin, p.group, list(p.keywords), p.encoded), strict=True)) for p in pictures]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"style": style})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, compression="zstd", use_dictionary=["skin", "group"])
    return file.stat().st_size


def read_sets(folder: str | None = None) -> list[Picture]:
    """Every picture of the sets that ship, or of those in a folder. Raises SpecificationError where there are none."""
    with resources.as_file(resources.files("calumma.jobs.emoji") / "sets") as shipped:
        place = shipped if folder is None else Path(folder).expanduser()
        files = sorted(place.glob("*.parquet"))
        if not files:
            raise SpecificationError(
                f"sets: {place} has no sets of pictures (*.parquet); calumma.jobs.emoji.rasterize makes them"
            )
        return [picture for file in files for picture in _read_set(file)]


def _read_set(file: Path) -> Iterable[Picture]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=list(COLUMNS))
        style = (table.schema.metadata or {})[b"style"].decode()
    except (pa.ArrowException, KeyError) as error:
        raise SpecificationError(f"sets: {file} is no set that calumma.jobs.emoji.rasterize has made") from error
    for row in table.to_pylist():
        keywords = tuple(row["keywords"])
        yield Picture(row["thing"], row["skin"], style, row["group"], keywords, row["picture"])


def choose(pictures: Sequence[Picture], groups: Sequence[str], things: int, toned: Sequence[str]) -> list[Picture]:
    """Of every style: as many things of some groups (as evenly spread over their names as can be), and some things with
    all their skins. Only what every style shows."""
    styles = {p.style for p in pictures}
    shown: dict[tuple[str, str], set[str]] = {}
    for p in pictures:
        shown.setdefault((p.thing, p.skin), set()).add(p.style)
    everywhere = {key for key, own in shown.items() if own == styles}
    plain = sorted(
        {p.thing for p in pictures if p.group in groups and (p.thing, "") in everywhere and p.thing not in toned}
    )
    kept = {plain[i] for i in np.linspace(0, len(plain) - 1, min(things, len(plain))).round().astype(int)}
    skinned = {thing for thing in toned if all((thing, skin) in everywhere for skin in ("", *SKINS))}
    return [p for p in pictures if (p.thing in kept and not p.skin) or p.thing in skinned]


def split(pictures: Sequence[Picture], seed: int, held_out: float = 0.2) -> tuple[list[Picture], list[Picture]]:
    """(training, held out). Of a share of the things one style is held out; of each thing with skins, in every style
    one skin, another each. Equal for equal seeds."""
    random = np.random.default_rng(seed)
    styles = sorted({p.style for p in pictures})
    toned = sorted({p.thing for p in pictures if p.skin})
    plain = sorted({p.thing for p in pictures} - set(toned))
    away: set[tuple[str, str, str]] = set()
    if len(styles) > 1:
        for index in random.permutation(len(plain))[: round(len(plain) * held_out)]:
            away.add((plain[index], "", styles[int(random.integers(len(styles)))]))
    for thing in toned:
        skins = random.permutation(len(SKINS))
        away |= {(thing, SKINS[skins[i % len(SKINS)]], style) for i, style in enumerate(styles)}
    is_away = [(p.thing, p.skin, p.style) in away for p in pictures]
    return (
        [p for p, out in zip(pictures, is_away, strict=True) if not out],
        [p for p, out in zip(pictures, is_away, strict=True) if out],
    )
