"""Images that data only names: data URLs, and paths below one folder of the storage that a source is given.

Whoever wrote the data wrote the paths, so they never lead out of that folder. What the folder itself holds is its
owner's: symbolic links in it are followed (Hugging Face's cache is made of them).
"""

from __future__ import annotations

import errno
import posixpath
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from calumma.model.document import Document, Image, Segment, Text
from calumma.model.images import from_base64, is_no_image
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, Draft, DraftSegment, Item, Malformed, Reference
from calumma.platform.sources.frames import frame_count, may_have_frames
from calumma.platform.sources.names import escaped, valid_words
from calumma.platform.sources.notes import Notes

PREFETCH = 32  # references, and documents, that are fetched ahead: object storage answers slowly, but many at a time
THREADS = 8
LONGEST_KEY = 1024  # bytes of a key in S3
SHOWN = 80  # characters of a reference in a message
DATA_URL = re.compile(r"data:(image/[\w.+-]+|application/octet-stream)?(;[^;,]*)*;\s*base64,", re.IGNORECASE)
REMOTE = re.compile(r"(https?|ftp):|//", re.IGNORECASE)
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
Fetched = Future[tuple[bytes, str | None]]
NO_FILE = (errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def resolve_references(
    items: Iterable[Draft | Document | BadInput],
    source: str,
    base: str,
    notes: Notes | None = None,
    location: str | None = None,
) -> Iterator[Item]:
    """The items as documents of a source, in order, with the images of their references; those that are left out since
    they cannot be had are counted in `notes`, and those below the source's `location` are named there as read. Raises
    StorageError."""
    notes = Notes() if notes is None else notes
    below = _place(storage.literal_folder(location)) + "/" if location is not None else None
    refers = below is not None and f"{_place(base)}/".startswith(below)
    base = base if storage.is_remote(base) else str(storage.local_path(base))  # no %2e%2e of a file:// URI
    pool = ThreadPoolExecutor(THREADS)  # starts no thread where there are no references
    waiting: deque[tuple[Draft | Document | BadInput, list[Fetched]]] = deque()
    fetching = 0
    try:
        for item in items:
            references = (
                [part for part in item.segments if isinstance(part, Reference)] if isinstance(item, Draft) else ()
            )
            if not references and not waiting:
                yield _item(item, [], source, notes, refers)
                continue
            images = [pool.submit(_fetch_best, part, base) for part in references]
            waiting.append((item, images))
            fetching += len(images)
            while waiting and (not waiting[0][1] or fetching > PREFETCH or len(waiting) > PREFETCH):
                fetching -= len(waiting[0][1])
                yield _item(*waiting.popleft(), source, notes, refers)
        while waiting:
            yield _item(*waiting.popleft(), source, notes, refers)
    finally:
        pool.shutdown(cancel_futures=True)


def _item(item: Draft | Document | BadInput, images: list[Fetched], source: str, notes: Notes, refers: bool) -> Item:
    if isinstance(item, BadInput):
        return item
    if isinstance(item, Document):
        return replace(item, source=source)
    about = {"name": valid_words(item.name)}
    if item.segments and all(map(_is_text, item.segments)):
        return Document(cast(tuple[Text, ...], item.segments), source, item.license, item.url, about)
    segments: list[Segment] = []
    fetched = iter(images)
    for part in item.segments:
        if not isinstance(part, Reference):
            segments.append(part)
            continue
        try:
            data, uri = next(fetched).result()
            if part.optional and is_no_image(data):
                notes.skip("images", "that cannot be had")
                continue
            segments.append(Image(data, part.caption, part.role, part.trained))
            if refers and uri is not None:
                notes.referred.add(_place(uri))
        except Malformed as error:
            if not part.optional:
                return BadInput(item.name, str(error))
            notes.skip("images", "that cannot be had")
    if not segments:
        return BadInput(item.name, "has neither text nor image that can be had")
    for segment in segments:
        if isinstance(segment, Image) and isinstance(segment.data, bytes) and may_have_frames(segment.data):
            notes.skip("frames", "beyond the first of an image", frame_count(segment.data) - 1)
    return Document(tuple(segments), source, item.license, item.url, about)


def _is_text(part: DraftSegment) -> bool:
    return type(part) is Text


def _place(uri: str) -> str:
    """A URI in the one form in which it is compared with others."""
    remote = storage.is_remote(uri)
    return escaped(uri.rstrip("/") if remote else posixpath.normpath(storage.local_path(uri).absolute()))


def unread(others: Mapping[str, Any], notes: Notes) -> list[str]:
    """Of the files beside a source's own, those that its records, when all are read, did not refer to."""
    return [uri for uri in others if _place(uri) not in notes.referred] if notes.referred else list(others)


def _fetch_best(reference: Reference, base: str) -> tuple[bytes, str | None]:
    """The bytes of an image from the first place that has it, and its file. Raises as `fetch`, of the last place."""
    for target in (reference.target, *reference.others)[:-1]:
        with suppress(Malformed):
            return fetch(target, base), _uri(target, base)
    last = (reference.target, *reference.others)[-1]
    return fetch(last, base), _uri(last, base)


def _uri(target: str, base: str) -> str | None:
    """The file that a reference names; None for a data URL. Raises Malformed when it names none below `base`."""
    return None if target[:5].lower() == "data:" else storage.join(base, path_of(target, base))


def fetch(target: str, base: str) -> bytes:
    """The bytes of an image. Raises Malformed when the reference is no image below `base`, and StorageError."""
    uri = _uri(target, base)
    if uri is None:
        return _decode_data_url(target)
    try:
        return storage.read_bytes(uri)
    except storage.NotFound as error:
        raise Malformed(f"there is no image {_abridged(target)} in {base}") from error
    except storage.StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in NO_FILE:
            raise Malformed(f"the image {_abridged(target)} is no file in {base}: {cause.strerror}") from error
        raise


def path_of(target: str, base: str) -> str:
    """The path below `base` that a reference names. Raises Malformed when it names none."""
    image = f"the image {_abridged(target)}"
    if REMOTE.match(target):
        raise Malformed(f"{image} is remote; download first, e.g. with img2dataset, and refer to the files by path")
    if SCHEME.match(target) or target.startswith("/"):
        raise Malformed(f"{image} is absolute; it must be a path below the source's images ({base})")
    path = posixpath.normpath(target) if target else "."
    if path == ".." or path.startswith("../"):
        raise Malformed(f"{image} leads out of the source's images ({base})")
    try:
        length = len(path.encode())
    except UnicodeEncodeError as error:
        raise Malformed(f"{image} is not valid Unicode") from error
    if path == "." or length > LONGEST_KEY or CONTROL.search(path):
        raise Malformed(f"{image} is no file name")
    return path


def _decode_data_url(url: str) -> bytes:
    match = DATA_URL.match(url)
    if match is None:
        raise Malformed(f"the image {_abridged(url)} is no data URL of an image (data:image/…;base64,…)")
    try:
        return from_base64(url[match.end() :].encode())
    except ValueError as error:
        raise Malformed(f"the image {_abridged(url)} is not valid base64: {error}") from error


def _abridged(target: str) -> str:
    return ascii(target if len(target) <= SHOWN else target[: SHOWN - 1] + "…") if target else "''"
