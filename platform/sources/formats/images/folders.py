"""Folders of image files: class folders and metadata files (imagefolder), and images with files of the same name beside
them (img2dataset's `files`).

https://huggingface.co/docs/datasets/image_dataset#imagefolder, https://github.com/rom1504/img2dataset
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from calumma.model.document import Image
from calumma.model.images import suffixes
from calumma.platform import storage
from calumma.platform.sources.encodings import Encoding
from calumma.platform.sources.files import BadInput, Draft, File, Malformed
from calumma.platform.sources.formats.images.captions import MEMBERS
from calumma.platform.sources.formats.images.pairs import IMAGES as PATH_FIELDS
from calumma.platform.sources.formats.images.pairs import PairFields
from calumma.platform.sources.formats.images.samples import sample_draft
from calumma.platform.sources.formats.images.values import OtherImages
from calumma.platform.sources.formats.records.containers import list_in, records
from calumma.platform.sources.names import hidden_part
from calumma.platform.sources.registry import ReaderItem, reader

LARGEST_IMAGE = 1 << 30  # bytes
IMAGES = tuple(sorted(suffixes()))
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of two in one folder the first is read
NO_CLASSES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "images", "data"})
SIDECARS = (".json", *(f".{name}" for name in MEMBERS))
IN_CASES = (*SIDECARS, *(suffix.upper() for suffix in SIDECARS))


def _choose(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    """Metadata files, and with them the images in and below their folders; without any, the images."""
    images = [uri for uri in uris if uri.lower().endswith(IMAGES)]
    folders: dict[str, dict[str, str]] = {}
    for uri in uris:
        folder, _, name = uri.rpartition("/")
        if name in METADATA:
            folders.setdefault(folder, {})[name] = uri
    if not folders:
        return images, ()
    described = [uri for uri in images if any(above in folders for above in _folders_above(uri))]
    return [next(files[name] for name in METADATA if name in files) for files in folders.values()], described


def _folders_above(uri: str) -> Iterator[str]:
    while "/" in uri:
        uri = uri.rpartition("/")[0]
        yield uri


@reader("imagefolder", (*IMAGES, *METADATA), references="location", choose=_choose)
def imagefolder(
    file: File,
    *,
    caption: str | None = None,
    names: dict[str, str] = {},  # noqa: B006 (never changed)
    other_images: OtherImages = "bad",
) -> Iterator[ReaderItem]:
    """Images whose folder is their caption (`names` gives folders another: {n01440764: tench}), or where a folder has a
    metadata.csv, .jsonl or .parquet: the images that its `file_name` or `file_names` name, with their `text`, or the
    field that `caption` names.
    """
    folder, _, base = file.uri.rpartition("/")
    if base not in METADATA:
        inside = _below(file.uri, file.images)
        label = posixpath.basename(posixpath.dirname(inside))
        words = None if label.lower() in NO_CLASSES else names.get(label, label) or None
        if words is None:
            file.notes.lack("caption")
        yield Draft((Image(file.read_all(LARGEST_IMAGE), words),), file.uri)
        return
    yield from _described(file, folder, PairFields(None, caption, optional=other_images == "leave_out"))


def _described(file: File, folder: str, fields: PairFields) -> Iterator[ReaderItem]:
    inside = _below(folder, file.images)
    named: set[str] = set()
    for row in records(file):
        if isinstance(row, BadInput):
            yield row
            continue
        name, record = row
        try:
            yield from fields.drafts(file, name, _with_paths(record, inside, named))
        except TypeError:  # of joining paths
            yield BadInput(name, "its file name is no text")
        except Malformed as error:  # of a list of paths
            yield BadInput(name, str(error))
    below = storage.sizes(folder)
    others = {
        above for uri in below if (above := posixpath.dirname(uri)) != folder and posixpath.basename(uri) in METADATA
    }
    for uri in below:
        if (
            uri.lower().endswith(IMAGES)
            and hidden_part(_below(uri, folder)) is None
            and others.isdisjoint(_folders_above(uri))
            and posixpath.normpath(posixpath.join(inside, _below(uri, folder))) not in named
        ):
            file.notes.skip("images", "named by no row of the metadata")


def _with_paths(record: Mapping[str, Any], inside: str, named: set[str]) -> dict[str, Any]:
    """The record with the paths of its images below the location."""
    row = dict(record)
    for field in PATH_FIELDS:
        value = list_in(row.get(field))
        if isinstance(value, list):
            row[field] = [_joined(inside, part) for part in value]
            named.update(posixpath.normpath(part) for part in row[field] if isinstance(part, str))
        elif value:
            row[field] = _joined(inside, value)
            if isinstance(row[field], str):
                named.add(posixpath.normpath(row[field]))
    return row


def _joined(inside: str, path: Any) -> Any:
    """The path below the location; what is no path stays as it is, but for what is neither bytes nor {bytes, path}."""
    if isinstance(path, bytes | Mapping) or (isinstance(path, str) and (":" in path[:8] or not path)):
        return path
    return posixpath.join(inside, path)


def _below(uri: str, base: str) -> str:
    try:
        path = storage.relative(uri, base)
    except ValueError:
        return ""
    return "" if path == "." else path


def _choose_samples(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    images = [uri for uri in uris if uri.lower().endswith(IMAGES)]
    keys = {posixpath.splitext(uri)[0] for uri in images}
    return images, [uri for uri in uris if uri.endswith(IN_CASES) and posixpath.splitext(uri)[0] in keys]


@reader("image_files", IMAGES, choose=_choose_samples)
def image_files(file: File, *, caption: str | None = None, encoding: Encoding = "utf-8") -> Iterator[ReaderItem]:
    """KEY.jpg beside KEY.txt (its caption) and KEY.json (the rest), as img2dataset's output format `files` has them;
    what holds the caption is as for webdataset."""
    key, suffix = posixpath.splitext(file.uri)
    parts = {suffix[1:].lower(): file.read_all(LARGEST_IMAGE)}
    for uri in storage.files_beside(key, SIDECARS):
        name = uri[len(key) + 1 :].lower()
        if name in parts:
            yield BadInput(file.at(name), f"{posixpath.basename(uri)} is there in two spellings; which is meant?")
            return
        parts[name] = storage.read_bytes(uri)
    yield sample_draft(file, posixpath.basename(key), parts, caption=caption, encoding=encoding)
