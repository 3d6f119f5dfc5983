"""A look at a location before anything is curated: what is there, what it seems to be, and its first documents."""

from __future__ import annotations

import inspect
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import yaml

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, File
from calumma.platform.sources.formats import find_format
from calumma.platform.sources.formats.images.folders import IMAGES
from calumma.platform.sources.formats.records.containers import ABOUT, SUFFIXES
from calumma.platform.sources.look.guess import RECORDS, TARS, Guess, first_records, guess_format
from calumma.platform.sources.notes import Notes, sentences, suffix
from calumma.platform.sources.reading import list_source, read_source
from calumma.platform.sources.registry import check_format
from calumma.platform.sources.specification import Source
from calumma.platform.specification import SpecificationError

ADVICE = re.compile(r"\{(other_images|unmarked|mark|images): ([^}]+)\}")
LOST = re.compile(r"there is no image|is remote")
TRIES = 4  # options that the messages of bad inputs advise, one after the other


@dataclass(frozen=True)
class Look:
    """`documents` and `bad`: among the first that the guessed format reads. `unread`: sentences."""

    location: str
    files: int
    bytes: int
    suffixes: dict[str, int]
    parts: dict[str, int]  # fields of the first records, or suffixes of the first members of an archive
    guess: Guess | None
    why_not: str
    documents: list[Document]
    bad: list[BadInput]
    inputs: int  # files that the format reads
    unread: list[str]
    read: int = 0  # documents that were read of it; the first of them are kept

    def source(self) -> Source:
        """The source of a curation. Only where there is a guess."""
        assert self.guess is not None
        words = re.sub(r"[^a-z0-9_-]+", "-", self.location.rstrip("/").rpartition("/")[2].partition(".")[0].lower())
        name = words.strip("-") or "source"
        return Source(
            name=name,
            format=self.guess.format,
            location=self.location,
            images=self.guess.images,
            options=self.guess.options,
        )

    def curation(self) -> str:
        """The YAML of a job that curates it."""
        source = self.source().model_dump(exclude_defaults=True)
        bad, first = "", len(self.bad) + self.read
        if self.bad:
            share = min(1.0, math.ceil(200 * len(self.bad) / first) / 100)
            bad = f"max_bad_share: {share}   # {len(self.bad)} of the first {first} are bad: look at why\n"
        listed = yaml.safe_dump([source], sort_keys=False, allow_unicode=True, width=1000)
        indented = "".join(f"  {line}\n" for line in listed.splitlines())
        return f"job: curate\nstorage: corpus\nresources: {{workers: 0}}\nsources:\n{indented}output: curated\n{bad}"


def look(location: str, format: str | None = None, options: dict[str, Any] | None = None, documents: int = 4) -> Look:
    """Look at a location, as the format given or that which it seems to be. Raises SpecificationError where there is
    nothing, and StorageError."""
    if not location.strip():
        raise SpecificationError("a location is empty; give a file, a folder, or s3://, hf://, gs:// or az://")
    if format:
        check_format(format, options or {})
    if not storage.is_remote(location):
        location = str(storage.local_path(location).absolute())
    sizes = storage.list_inputs(location).sizes
    if not sizes:
        raise SpecificationError(f"there is nothing at {location}{_nearby(location)}")
    found = Guess(format, "as you say", options or {}) if format else guess_format(location, sizes)
    guess = found if isinstance(found, Guess) else None
    suffixes = Counter(suffix(uri) for uri in sizes)
    empty = Look(
        location, len(sizes), sum(sizes.values()), dict(suffixes.most_common()), {}, None, str(found), [], [], 0, []
    )
    if guess is None:
        return empty
    best = _sample(replace(empty, guess=guess, why_not=""), documents)
    for _ in range(TRIES):
        if not best.bad or format is not None or (more := _advised(best)) is None:
            break
        again = _sample(replace(best, guess=more), documents)
        if len(again.bad) >= len(best.bad) and len(again.documents) <= len(best.documents):
            break
        best = again
    return replace(best, parts=_parts(best))


def _sample(seen: Look, wanted: int) -> Look:
    source = seen.source()
    files, others = list_source(source.format, source.location)
    notes = Notes()
    documents: list[Document] = []
    bad: list[BadInput] = []
    items = (item for uri in files for item in read_source(source, uri, notes=notes))
    for item in islice(items, RECORDS):
        if isinstance(item, BadInput):
            bad.append(item)
        else:
            documents.append(item)
        if len(documents) >= wanted and len(documents) + len(bad) >= 5 * wanted:
            break
    for uri, (kind, name) in others.items():
        if not (notes.referred and uri.lower().endswith(IMAGES)):  # further records refer to others
            notes.skip(kind, name)
    read = len(documents)
    report = {"read": read, **notes.report()}
    return replace(seen, documents=documents[:wanted], bad=bad, inputs=len(files), unread=sentences(report), read=read)


def _advised(seen: Look) -> Guess | None:
    """The guess with an option that the message of a bad input advises."""
    assert seen.guess is not None
    known = inspect.signature(find_format(seen.guess.format).read).parameters
    for item in seen.bad:
        match = ADVICE.search(item.reason)
        name, value = (match[1], yaml.safe_load(match[2])) if match else ("other_images", "leave_out")
        if not match and not LOST.search(item.reason):
            continue
        if name in known and seen.guess.options.get(name) != value:
            return replace(seen.guess, options={**seen.guess.options, name: value})
    return None


def _parts(seen: Look) -> dict[str, int]:
    assert seen.guess is not None
    counts: Counter[str] = Counter()
    files, _ = list_source(seen.guess.format, seen.location)
    uri = next(iter(files), "")
    if uri.lower().endswith(TARS):
        counts.update(islice(_member_suffixes(uri), RECORDS))
    elif uri.lower().endswith(SUFFIXES) and uri.rpartition("/")[2] not in ABOUT:
        for row in first_records(uri):
            counts.update(row.keys())
    return dict(counts.most_common())


def _member_suffixes(uri: str) -> Iterator[str]:
    with storage.open_read(uri) as raw:
        try:
            with tarfile.open(fileobj=cast(Any, File(uri, raw, "").content), mode="r|") as tar:
                for member in tar:
                    if member.isreg():
                        yield "." + member.name.rpartition("/")[2].partition(".")[2]
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if isinstance(error, storage.StorageError):
                raise


def _nearby(location: str) -> str:
    """For a misspelt local path: what its folder has."""
    if storage.is_remote(location):
        return ""
    folder = next(path for path in Path(location).parents if path.exists())
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    return f"; {folder} has {', '.join(names) or 'nothing'}"
