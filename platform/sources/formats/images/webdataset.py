"""WebDataset tar archives, as img2dataset and others write them: KEY.jpg, KEY.txt (caption), KEY.json (the rest).

https://github.com/webdataset/webdataset, https://github.com/rom1504/img2dataset
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Literal

from calumma.platform.sources import compression
from calumma.platform.sources.encodings import Encoding
from calumma.platform.sources.files import BadInput, File
from calumma.platform.sources.formats.images.archive import Member, members, plain_name
from calumma.platform.sources.formats.images.samples import sample_draft
from calumma.platform.sources.registry import ReaderItem, reader

SUFFIXES = (".tar", *(f".tar{suffix}" for suffix in compression.SUFFIXES), *compression.ARCHIVES)
Key = Literal["first_dot", "last_dot"]


@reader("webdataset", SUFFIXES)
def webdataset(
    file: File,
    *,
    caption: str | None = None,
    key: Key = "first_dot",
    images: Literal["one", "several"] = "one",
    encoding: Encoding = "utf-8",
) -> Iterator[ReaderItem]:
    """One document a key. The caption is the member `.txt`, `.caption`, `.text` or `.cls`, or of the `.json` the field
    `caption`, `captions` or `text`; or the member or field that `caption` names.

    A key ends at the first dot of a name, or at the last (`key: last_dot`). A sample of several images is one document
    of all (`images: several`), with its words behind them. A JSON of `texts` and `images` beside a TIFF of several
    frames, as MINT-1T has them, is an interleaved page. What damage hides costs the samples it is part of.
    """
    read = partial(_item, file, caption=caption, encoding=encoding, several=images == "several")
    for found in _known_samples(file, key):
        yield found if isinstance(found, BadInput) else read(found)


def _known_samples(file: File, key: Key) -> Iterator[_Sample | BadInput]:
    """The samples; beside damage, those that have the parts that others have, and else a BadInput for each."""
    whole: set[str] | None = None  # the extensions of the last sample that has no damage beside it
    waiting: list[_Sample | BadInput] = []  # until there is such a one
    for found in _samples(file, key):
        if isinstance(found, BadInput) or found.doubtful:
            waiting.append(found)
            if whole is None:
                continue
        else:
            whole = set(found.parts)
            if not waiting:
                yield found
                continue
            waiting.append(found)
        if isinstance(found, _Sample) and not found.cut:  # one that is cut is told with the damage behind it
            yield from _decide(waiting, whole, file)
            waiting = []
    yield from _decide(waiting, whole, file)


def _decide(waiting: list[_Sample | BadInput], whole: set[str] | None, file: File) -> Iterator[_Sample | BadInput]:
    cut = ""
    for found, behind in zip_longest(waiting, waiting[1:]):
        if isinstance(found, BadInput):
            yield BadInput(cut, found.reason, found.bytes_lost) if cut else found
            cut = ""
        elif not found.doubtful or found.problem or set(found.parts) == whole:
            yield found
        elif isinstance(behind, BadInput):
            cut = file.at(found.key)
        else:
            yield BadInput(file.at(found.key), "parts of it may be lost to the damage beside it")


def _samples(file: File, key: Key) -> Iterator[_Sample | BadInput]:
    sample = _Sample("")
    for member in members(file):
        if isinstance(member, BadInput):
            if sample.parts:
                sample.doubtful = sample.cut = True
                yield sample
            yield member
            sample = _Sample("", doubtful=True)
            continue
        name, extension = _split(member.name, key)
        if name != sample.key:
            if sample.parts:
                yield sample
            sample = _Sample(name, doubtful=sample.doubtful and not sample.parts)
        sample.add(extension, member)
    if sample.parts:
        yield sample


@dataclass
class _Sample:
    """`doubtful`: parts of it may be lost to damage beside it; `cut`: behind it."""

    key: str
    doubtful: bool = False
    cut: bool = False
    parts: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    problem: str = ""

    def add(self, extension: str, member: Member) -> None:
        extension = extension.lower()
        if extension in self.parts:
            other = self.names[extension]
            again = f"{other} is in it twice" if other == member.name else f"{other} and {member.name} are one name"
            self.problem = self.problem or f"{again}; which one is meant cannot be told"
        elif member.problem:
            self.problem = self.problem or f"{member.name} {member.problem}"
        self.parts.setdefault(extension, member.data)
        self.names.setdefault(extension, member.name)


def _item(
    file: File,
    sample: _Sample,
    *,
    caption: str | None,
    encoding: str,
    several: bool,
) -> ReaderItem:
    if sample.problem:
        return BadInput(file.at(sample.key), sample.problem)
    return sample_draft(file, sample.key, sample.parts, caption=caption, encoding=encoding, several=several)


def _split(name: str, key: Key) -> tuple[str, str]:
    """The key and the extension of a member's name."""
    folder, slash, base = plain_name(name).rpartition("/")
    stem, _, extension = base.partition(".") if key == "first_dot" else base.rpartition(".")
    return f"{folder}{slash}{stem}", extension
