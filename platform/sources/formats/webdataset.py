"""WebDataset tar archives, as img2dataset and others write them: KEY.jpg, KEY.txt (caption), KEY.json (the rest).

https://github.com/webdataset/webdataset, https://github.com/rom1504/img2dataset
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from typing import Any, cast

from calumma.model.document import Image
from calumma.model.images import suffixes
from calumma.platform.sources.files import BadInput, Draft, File, json_type, text_or_none
from calumma.platform.sources.registry import ReaderItem, reader


@reader("webdataset", (".tar",))
def webdataset(file: File) -> Iterator[ReaderItem]:
    """One document a key. An archive that ends or breaks early gives the samples that were whole before it."""
    sample: dict[str, bytes] = {}
    key = ""
    last_extensions: set[str] = set()  # the extensions of the last whole sample
    try:
        for name, data in _members(file):
            folder, slash, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            sample_key = f"{folder}{slash}{stem}"
            if sample_key != key and sample:
                last_extensions = set(sample)
                yield _sample(file, key, sample)
                sample = {}
            key = sample_key
            sample[extension.lower()] = data
    except _DamagedArchive as damage:
        # The sample at the damage counts as whole when it has all parts that the one before it had.
        if sample and set(sample) == last_extensions:
            yield _sample(file, key, sample)
            sample = {}
        yield BadInput(file.at(key) if sample else file.uri, str(damage), damage.bytes_lost)
        return
    if sample:
        yield _sample(file, key, sample)


class _DamagedArchive(ValueError):
    def __init__(self, reason: str, bytes_lost: int) -> None:
        super().__init__(reason)
        self.bytes_lost = bytes_lost


def _members(file: File) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files of a tar archive. Raises _DamagedArchive where it breaks.

    Python's tarfile ends silently on a broken or missing header after the first; the archive's end mark tells.
    """
    size = file.size
    position = 0
    try:
        with tarfile.open(fileobj=cast(Any, file.raw), mode="r:") as tar:
            while (member := tar.next()) is not None:
                position = member.offset
                if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is {member.size:,} bytes long")
                if member.isreg() and (content := tar.extractfile(member)) is not None:
                    yield member.name, content.read()
                position = tar.offset
                cast(Any, tar).members.clear()  # else it keeps a kilobyte for every member it has passed
            file.raw.seek(position)
            block = file.raw.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if position == 0:
            raise _DamagedArchive(f"not a readable tar archive: {error}", size) from error
        lost = max(0, size - position)
        raise _DamagedArchive(
            f"the archive breaks off after byte {size - lost:,} of {size:,}: {error}", lost
        ) from error
    if not block:
        raise _DamagedArchive(f"the archive breaks off at byte {size:,}: it has no end mark", 0)
    if block.strip(b"\0"):
        raise _DamagedArchive(f"the archive is damaged from byte {position:,} of {size:,} on", size - position)


def _sample(file: File, key: str, parts: dict[str, bytes]) -> ReaderItem:
    name = file.at(key)
    try:
        metadata = json.loads(parts["json"]) if "json" in parts else {}
        caption = parts["txt"].decode() if "txt" in parts else None
    except (ValueError, RecursionError) as error:
        return BadInput(name, f"caption or metadata cannot be read: {error}")
    if not isinstance(metadata, dict):
        return BadInput(name, f"its .json holds {json_type(metadata)}, not an object")
    status = metadata.get("status")
    if isinstance(status, str) and status != "success":
        return BadInput(name, f"its status is {status!r}: {metadata.get('error_message') or 'no reason given'}")
    images = [extension for extension in parts if f".{extension}" in suffixes()]
    if len(images) != 1:
        count = f"{len(images)} images ({', '.join(images)})" if images else "no image"
        return BadInput(name, f"has {count} among {', '.join(sorted(parts))}; a sample is one image and its caption")
    if caption is None:
        caption = text_or_none(metadata.get("caption"))
    image = Image(parts[images[0]], caption.strip() or None if caption else None)
    return Draft.from_record((image,), file.at(f"{key}.{images[0]}"), metadata)
