"""Files of a source: which there are, and the documents and bad inputs in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, File, Item, Malformed
from calumma.platform.sources.formats import find_format
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.references import resolve_references
from calumma.platform.sources.registry import Reader, ReaderItem, checked_options
from calumma.platform.sources.specification import Source
from calumma.platform.specification import SpecificationError


def read_file(
    format: str,
    source: str,
    uri: str,
    images: str | None = None,
    options: Mapping[str, Any] | None = None,
    location: str | None = None,
    notes: Notes | None = None,
) -> Iterator[Item]:
    """Items of one raw file, in its order; each document's metadata holds its `name`. `location` is the source that the
    file belongs to. What is left unread is counted in `notes`. Damaged data never raises; StorageError is a fault of
    the storage, SpecificationError of the call.
    """
    form = find_format(format)
    arguments = checked_options(format, form.read, options or {})
    base = images or _folder(uri, location if form.references == "location" else None)
    with storage.open_read(uri) as raw:
        file = File(uri, raw, base, notes)
        yield from resolve_references(_reader_items(form.read, file, arguments), source, base)


def read_source(
    source: Source, uri: str, locate: Callable[[str], str] = str, notes: Notes | None = None
) -> Iterator[Item]:
    """`read_file` for one file of a source; `locate` makes its locations absolute, as JobSpecification.locate does."""
    images = locate(source.images) if source.images else None
    return read_file(source.format, source.name, uri, images, source.options, locate(source.location), notes)


def list_source(format: str, location: str) -> tuple[dict[str, int], list[str]]:
    """(URI -> bytes of the files to read, URIs of other files) at a location: the file itself, or all below a folder.

    A manifest below a folder is no input. Raises StorageError, SpecificationError.
    """
    suffixes = find_format(format).suffixes or ("",)
    sizes = dict(sorted(storage.sizes(location).items()))
    if len(sizes) == 1 and _same_file(location, next(iter(sizes))):
        return sizes, []
    files = {
        uri: size
        for uri, size in sizes.items()
        if uri.lower().endswith(suffixes) and PurePosixPath(uri).name != storage.MANIFEST
    }
    return files, [uri for uri in sizes if uri not in files]


def require_files(source: Source, locate: Callable[[str], str] = str) -> tuple[dict[str, int], list[str]]:
    """`list_source` of a source that must have files. Raises SpecificationError when it has none, and StorageError."""
    location = locate(source.location)
    files, others = list_source(source.format, location)
    if files:
        return files, others
    suffixes = " or ".join(f"*{suffix}" for suffix in find_format(source.format).suffixes)
    explanation = "there is nothing at that location"
    if others:
        names = ", ".join(storage.relative(uri, location) for uri in others[:3])
        explanation = f"there are {len(others):,} other files, such as {names}"
    raise SpecificationError(
        f"source {source.name!r} ({source.format}): no {f'{suffixes} ' if suffixes else ''}files at {location}; "
        f"{explanation}"
    )


def name_of(document: Document) -> str:
    """Where a document came from: file and place in it."""
    return document.metadata.get("name", document.source)


def _reader_items(read: Reader, file: File, arguments: dict[str, Any]) -> Iterator[ReaderItem]:
    try:
        yield from read(file, **arguments)
    except Malformed as error:  # of the file, not of one record
        yield BadInput(file.uri, str(error), file.size)


def _folder(uri: str, location: str | None) -> str:
    """The location, when the file is below it, or the folder that the file is in."""
    if location is not None and not _same_file(location, uri):
        return location
    return uri.rpartition("/")[0] if "/" in uri else "."


def _same_file(location: str, file: str) -> bool:
    if storage.is_remote(location):
        return location == file
    return storage.local_path(location) == Path(storage.local_path(file))
