"""Files of a source: which there are, and the documents and bad inputs in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, File, Item, Malformed
from calumma.platform.sources.formats import find_format
from calumma.platform.sources.names import escaped, hidden_part
from calumma.platform.sources.notes import Notes, suffix
from calumma.platform.sources.references import resolve_references
from calumma.platform.sources.registry import Reader, ReaderItem, checked_options
from calumma.platform.sources.specification import Source
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest, ManifestError

MISSING = "files that are not there"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
Unread = tuple[str, str]  # kind and name, as `Notes.skip` counts them


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
        items = _reader_items(form.read, file, arguments)
        yield from resolve_references(items, source, base, file.notes, location)


def read_source(
    source: Source, uri: str, locate: Callable[[str], str] = str, notes: Notes | None = None
) -> Iterator[Item]:
    """`read_file` for one file of a source; `locate` makes its locations absolute, as JobSpecification.locate does."""
    images = locate(source.images) if source.images else None
    return read_file(source.format, source.name, uri, images, source.options, locate(source.location), notes)


def list_source(format: str, location: str) -> tuple[dict[str, int], dict[str, Unread]]:
    """(URI -> bytes of the files to read, URI -> what others are, as `Notes.skip` counts it) at a location: the file
    itself, all below a folder, or what a pattern matches.

    No input are: files of other suffixes, a manifest (a job's own is not even among the others), what is hidden
    (`hidden_part`), links that lead nowhere. Raises StorageError, SpecificationError.
    """
    form = find_format(format)
    suffixes = form.suffixes or ("",)
    listing = storage.list_inputs(location)
    sizes = listing.sizes
    if len(sizes) == 1 and _same_file(location, next(iter(sizes))):
        return sizes, {}
    base = storage.literal_folder(location)
    files: dict[str, int] = {}
    others: dict[str, Unread] = {}
    for uri, size in sizes.items():
        if (part := hidden_part(_below(uri, base))) is not None:
            others[uri] = ("hidden files", part)
        elif PurePosixPath(uri).name == storage.MANIFEST and _is_own_manifest(uri):
            continue
        elif PurePosixPath(uri).name == storage.MANIFEST or not uri.lower().endswith(suffixes):
            others[uri] = ("files", suffix(uri))
        else:
            files[uri] = size
    if form.choose is not None:
        chosen, along = map(set, form.choose([uri for uri in sizes if others.get(uri, ("files", ""))[0] == "files"]))
        others |= {uri: ("files", suffix(uri)) for uri in files if uri not in chosen}
        files = {uri: size for uri, size in files.items() if uri in chosen}
        others = {uri: what for uri, what in others.items() if uri not in along}
    others |= {uri: ("links and devices", PurePosixPath(uri).name) for uri in listing.broken}
    others |= {uri: (MISSING, PurePosixPath(uri).name) for uri in listing.missing}
    return files, others


def _is_own_manifest(uri: str) -> bool:
    """Whether it is what a job has published with its files, and no stranger's of the same name."""
    try:
        Manifest.read(uri.rpartition("/")[0] or ".")
    except (ManifestError, storage.StorageError):
        return False
    return True


def _below(uri: str, base: str) -> str:
    """The path of a file below a folder; its name where it is not below."""
    try:
        return storage.relative(uri, base)
    except ValueError:
        return PurePosixPath(uri).name


def require_files(source: Source, locate: Callable[[str], str] = str) -> tuple[dict[str, int], dict[str, Unread]]:
    """`list_source` of a source that must have files. Raises SpecificationError when it has none, and StorageError."""
    location = locate(source.location)
    files, others = list_source(source.format, location)
    if files:
        return files, others
    suffixes = " or ".join(f"*{suffix}" for suffix in find_format(source.format).suffixes)
    explanation = "there is nothing at that location"
    if others and all(kind == MISSING for kind, _ in others.values()):
        explanation = f"none of the {len(others):,} that it names is there"
    elif others:
        base = storage.literal_folder(location)
        names = ", ".join(escaped(_below(uri, base)) for uri in list(others)[:3])
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
        if file.size <= 1024 and file.raw.read(len(LFS_POINTER)) == LFS_POINTER:
            raise Malformed("is a pointer of Git LFS, not the file itself; `git lfs pull` fetches it")
        file.raw.seek(0)
        yield from read(file, **arguments)
    except Malformed as error:  # of the file, not of one record
        yield BadInput(file.name, str(error), file.size)
    except storage.StorageError:
        raise
    except OSError as error:  # of what a reader reads without looking out for damage
        yield file.damage(file.name, error)[0]


def _folder(uri: str, location: str | None) -> str:
    """The location (of a pattern its literal folder), when the file is below it, or the folder that the file is in."""
    if location is not None and not _same_file(location, uri):
        return storage.literal_folder(location)
    return uri.rpartition("/")[0] if "/" in uri else "."


def _same_file(location: str, file: str) -> bool:
    if storage.is_remote(location):
        return location == file
    return storage.local_path(location) == Path(storage.local_path(file))
