"""Raw formats, read into documents: each reader turns one file into documents and the inputs that are no documents.

A reader never fails on damaged data: it yields a `BadInput` that names the place and goes on where it can. What it
does raise (StorageError) is a fault of the storage, not of the data.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, cast

from calumma.model.document import Document, Image, Role, Segment, Text
from calumma.platform import storage

IMAGE_MARK = "<image>"
IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"})
SPEAKERS: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class BadInput:
    """One input that is no document. `name` is the file and the place in it; `bytes_lost` counts what a damaged file
    hides behind the damage, in bytes of that file (0 for a single bad item)."""

    name: str
    reason: str
    bytes_lost: int = 0


Item = Document | BadInput
Reader = Callable[[str, BufferedIOBase], Iterator[Item]]


@dataclass(frozen=True)
class Format:
    """`read(uri, opened file)` yields items; files of other suffixes below a prefix are not input."""

    suffixes: tuple[str, ...]
    read: Reader


class _Malformed(ValueError):
    """A record that does not say what its format requires."""


def read_file(format: str, source: str, uri: str) -> Iterator[Item]:
    """Items of one raw file, in its order; each document's metadata holds its `name`. Raises StorageError."""
    with storage.open_read(uri) as file:
        for item in FORMATS[format].read(uri, file):
            yield replace(item, source=source) if isinstance(item, Document) else item


def name_of(document: Document) -> str:
    """Where a document came from: file and place in it."""
    return document.metadata.get("name", document.source)


# -- WebDataset: tar archives with KEY.png, KEY.txt (caption), KEY.json (license, url) ---------------------------------


def read_webdataset(uri: str, file: BufferedIOBase) -> Iterator[Item]:
    """One document a key. An archive that ends or breaks early gives the samples that were whole before it."""
    sample: dict[str, bytes] = {}
    key = ""
    usual: set[str] = set()  # the extensions of the last whole sample
    try:
        for name, data in _members(file):
            folder, slash, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            found = f"{folder}{slash}{stem}"
            if found != key and sample:
                usual = set(sample)
                yield _sample(uri, key, sample)
                sample = {}
            key = found
            sample[extension.lower()] = data
    except _Damaged as damage:
        # The sample at the damage counts as whole when it has all parts that the one before it had.
        if sample and set(sample) == usual:
            yield _sample(uri, key, sample)
            sample = {}
        place = f"{uri}: {key}" if sample else uri
        yield BadInput(place, str(damage), damage.bytes_lost)
        return
    if sample:
        yield _sample(uri, key, sample)


class _Damaged(ValueError):
    def __init__(self, reason: str, bytes_lost: int) -> None:
        super().__init__(reason)
        self.bytes_lost = bytes_lost


def _members(file: BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a tar archive. Raises _Damaged where it breaks.

    Python's tarfile ends silently on a broken or missing header after the first; the archive's end mark tells.
    """
    size = _size(file)
    position = 0
    try:
        with tarfile.open(fileobj=cast(Any, file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                position = member.offset
                if member.isreg() and (content := tar.extractfile(member)) is not None:
                    yield member.name, content.read()
                position = tar.offset
            file.seek(position)
            block = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if position == 0:
            raise _Damaged(f"not a readable tar archive: {error}", size) from error
        lost = max(0, size - position)
        raise _Damaged(f"the archive breaks off after byte {size - lost:,} of {size:,}: {error}", lost) from error
    if not block:
        raise _Damaged(f"the archive breaks off at byte {size:,}: it has no end mark", 0)
    if block.strip(b"\0"):
        raise _Damaged(f"the archive is damaged from byte {position:,} of {size:,} on", size - position)


def _sample(uri: str, key: str, parts: dict[str, bytes]) -> Item:
    name = f"{uri}: {key}"
    images = [extension for extension in parts if extension in IMAGE_SUFFIXES]
    if len(images) != 1:
        count = f"{len(images)} images ({', '.join(images)})" if images else "no image"
        return BadInput(name, f"has {count} among {', '.join(sorted(parts))}; a sample is one image and its caption")
    try:
        caption = parts["txt"].decode().strip() if "txt" in parts else None
        metadata = json.loads(parts["json"]) if "json" in parts else {}
    except (ValueError, RecursionError) as error:
        return BadInput(name, f"caption or metadata cannot be read: {error}")
    if not isinstance(metadata, dict):
        return BadInput(name, f"its .json holds {_kind(metadata)}, not an object")
    image = Image(parts[images[0]], caption or None)
    return _document((image,), f"{uri}: {key}.{images[0]}", metadata)


# -- JSON lines --------------------------------------------------------------------------------------------------------


def read_jsonl(uri: str, file: BufferedIOBase) -> Iterator[Item]:
    """{"text": …, "license": …, "url": …} a line."""
    yield from _json_lines(uri, file, _plain_text)


def read_conversations(uri: str, file: BufferedIOBase) -> Iterator[Item]:
    """{"conversations": [{"from": "human"|"gpt", "value": …}], "images": [data URL, …], "captions": […]} a line.

    The k-th `<image>` mark of a conversation is its k-th image.
    """
    yield from _json_lines(uri, file, _conversation)


def _json_lines(uri: str, file: BufferedIOBase, parse: Callable[[dict[str, Any]], Sequence[Segment]]) -> Iterator[Item]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        name = f"{uri}: line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise _Malformed(f"holds {_kind(row)}, not an object")
            yield _document(parse(row), name, row)
        except _Malformed as error:
            yield BadInput(name, str(error))
        except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, an endless number, endless brackets
            yield BadInput(name, f"not a line of JSON: {error}")


def _plain_text(row: dict[str, Any]) -> Sequence[Segment]:
    if "text" not in row:
        raise _Malformed(f"has no `text`; it has {_names(row)}")
    if not isinstance(row["text"], str):
        raise _Malformed(f"`text` is {_kind(row['text'])}, not a string")
    return (Text(row["text"]),)


def _conversation(row: dict[str, Any]) -> Sequence[Segment]:
    turns, images = row.get("conversations"), row.get("images") or []
    if not isinstance(turns, list) or not turns:
        raise _Malformed(f"has no list `conversations`; it has {_names(row)}")
    if not isinstance(images, list):
        raise _Malformed(f"`images` is {_kind(images)}, not a list")
    captions = row.get("captions") or [None] * len(images)
    if not isinstance(captions, list) or len(captions) != len(images):
        raise _Malformed("`captions` must be a list as long as `images`")
    segments: list[Segment] = []
    used = 0
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Malformed('a turn must be {"from": …, "value": text}')
        role = SPEAKERS.get(str(turn.get("from")))
        if role is None:
            raise _Malformed(f"a turn is from {turn.get('from')!r}; allowed: {', '.join(SPEAKERS)}")
        for index, text in enumerate(turn["value"].split(IMAGE_MARK)):
            if index:
                if used < len(images):
                    segments.append(Image(_from_data_url(images[used], used), _text_or_none(captions[used]), role))
                used += 1
            if text:
                segments.append(Text(text, role))
    if used != len(images):
        raise _Malformed(f"has {used} {IMAGE_MARK} marks and {len(images)} images; they must agree")
    return segments


def _from_data_url(value: Any, index: int) -> bytes:
    match = DATA_URL.match(value) if isinstance(value, str) else None
    if match is None:
        shown = repr(value[:40]) if isinstance(value, str) else _kind(value)
        raise _Malformed(f"image {index} is no data URL (data:image/…;base64,…) but {shown}")
    try:
        return base64.b64decode(value[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Malformed(f"image {index} is not valid base64: {error}") from error


# -- interleaved pages: Parquet with parallel lists `texts` and `images` -----------------------------------------------


def read_interleaved(uri: str, file: BufferedIOBase) -> Iterator[Item]:
    """Rows of `texts: list<string|null>`, `images: list<binary|null>`, exactly one of the two set at each index, and
    optional `captions`, `license`, `url`. A row group that cannot be read is one bad input; the others are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = pq.ParquetFile(cast(Any, file))
    except storage.StorageError:
        raise
    except unreadable as error:
        yield BadInput(uri, f"not a readable Parquet file: {error}", _size(file))
        return
    names = table.schema_arrow.names
    if missing := {"texts", "images"} - set(names):
        yield BadInput(uri, f"has no column {', '.join(sorted(missing))}; it has {', '.join(names)}", _size(file))
        return
    columns = [c for c in ("texts", "images", "captions", "license", "url") if c in names]
    for group in range(table.num_row_groups):
        number = 0
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                for row in batch.to_pylist():
                    yield _page(row, f"{uri}: row group {group}, row {number}")
                    number += 1
        except storage.StorageError:
            raise
        except unreadable as error:
            lost = table.metadata.row_group(group).num_rows - number
            share = lost / max(1, table.metadata.num_rows)
            reason = f"{lost:,} rows cannot be read: {error}"
            yield BadInput(f"{uri}: row group {group}", reason, round(share * _size(file)))


def _page(row: dict[str, Any], name: str) -> Item:
    texts, images = row["texts"] or [], row["images"] or []
    captions = row.get("captions") or [None] * len(images)
    if not all(isinstance(column, list) for column in (texts, images, captions)):
        return BadInput(name, "texts, images and captions must be lists")
    if not len(texts) == len(images) == len(captions):
        lengths = f"{len(texts)}, {len(images)}, {len(captions)}"
        return BadInput(name, f"texts, images and captions must be equally long, found {lengths}")
    segments: list[Segment] = []
    for index, (text, image, caption) in enumerate(zip(texts, images, captions, strict=True)):
        if (text is None) == (image is None):
            both = "both a text and an image" if text is not None else "neither text nor image"
            return BadInput(name, f"has {both} at index {index}")
        if text is not None and not isinstance(text, str):
            return BadInput(name, f"the text at index {index} is {_kind(text)}")
        if image is not None and not isinstance(image, bytes):
            return BadInput(name, f"the image at index {index} is {_kind(image)}, not bytes")
        if isinstance(text, str):
            segments.append(Text(text))
        if isinstance(image, bytes):
            segments.append(Image(image, _text_or_none(caption)))
    return _document(segments, name, row)


# ----------------------------------------------------------------------------------------------------------------------


FORMATS: dict[str, Format] = {
    "webdataset": Format((".tar",), read_webdataset),
    "jsonl": Format((".jsonl",), read_jsonl),
    "interleaved": Format((".parquet",), read_interleaved),
    "conversations": Format((".jsonl",), read_conversations),
}


def list_source(format: str, location: str) -> tuple[dict[str, int], list[str]]:
    """(URI -> bytes of the files to read, URIs of other files) at a location: the file itself, or all below a folder.

    Raises StorageError.
    """
    found = dict(sorted(storage.sizes(location).items()))
    if len(found) == 1 and _is(location, next(iter(found))):
        return found, []
    suffixes = FORMATS[format].suffixes
    files = {uri: size for uri, size in found.items() if PurePosixPath(uri).suffix.lower() in suffixes}
    return files, [uri for uri in found if uri not in files]


def _is(location: str, file: str) -> bool:
    return location == file if storage.is_remote(location) else storage.local_path(location) == Path(file)


def _document(segments: Sequence[Segment], name: str, row: dict[str, Any]) -> Document:
    license, url = _text_or_none(row.get("license")), _text_or_none(row.get("url"))
    return Document(tuple(segments), license=license or "", url=url or "", metadata={"name": name})


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, list(row)[:10])) or "nothing"


def _kind(value: Any) -> str:
    """What a JSON value is, in the words of its reader."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _size(file: BufferedIOBase) -> int:
    place = file.tell()
    size = file.seek(0, 2)
    file.seek(place)
    return size
