"""Curated examples in two parts, to train on and to be held out, and how long they are in tokens.

Which part an example belongs to is decided by what it says: equal examples are never on both sides, and a second call
divides them alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from calumma.jobs.tuning.examples import WrongExamples, fault
from calumma.model.document import Document, Image, Text
from calumma.model.tokenizers.text import TextTokenizer
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest, directory_fingerprint

TRAIN, HELD_OUT = "train", "held_out"
A_SHARD = 1000  # documents of a shard
MOST_HELD_OUT = 500


@dataclass(frozen=True)
class Parts:
    """Examples of each part, and tokens of those that are trained on."""

    train: int
    held_out: int
    tokens: int
    longest: int

    @property
    def mean(self) -> float:
        return self.tokens / self.train


def split(
    curated: str, folder: str, share: float, tokenizer: TextTokenizer, image_length: int, progress: Progress
) -> Parts:
    """Write FOLDER/train and FOLDER/held_out of a directory of curated documents; about `share` of them are held out,
    MOST_HELD_OUT at most, and one at least where there are two. image_length: tokens of an image. Where both parts are
    there already they stay. Raises WrongExamples when nothing is left to train on."""
    made_from = {"curated": directory_fingerprint(curated), "share": str(share)}
    done = [Manifest.find(storage.join(folder, part)) for part in (TRAIN, HELD_OUT)]
    if all(manifest is not None and manifest.inputs == made_from for manifest in done):
        assert done[0] is not None
        return Parts(**done[0].report["parts"])
    digests, lengths = [], []
    for document in _good(curated):
        digests.append(_digest(document))
        lengths.append(_tokens(document, tokenizer, image_length))
        progress(len(digests), 0, f"{len(digests):,} examples measured")
    if not digests:
        raise WrongExamples(f"{curated}: no example is left after curation; {curated}/manifest.json says why")
    wanted = min(MOST_HELD_OUT, max(round(share * len(digests)), 1)) if share else 0
    chosen = sorted(set(digests))[: min(wanted, len(set(digests)) - 1)]
    limit = chosen[-1] if chosen else b""
    kept = [length for digest, length in zip(digests, lengths, strict=True) if digest > limit]
    parts = Parts(len(kept), len(digests) - len(kept), sum(kept), max(kept))
    for part in (TRAIN, HELD_OUT):
        documents = (d for d in _good(curated) if (_digest(d) > limit) == (part == TRAIN))
        _write(storage.join(folder, part), documents, made_from, parts, progress)
    return parts


def _good(curated: str) -> Iterator[Document]:
    return (document for document in document_shards.read_documents(curated) if fault(document) is None)


def _write(
    uri: str, documents: Iterable[Document], made_from: dict[str, str], parts: Parts, progress: Progress
) -> None:
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:8]
    files: list[FileEntry] = []
    images = rows = 0
    waiting = iter(documents)
    while shard := list(islice(waiting, A_SHARD)):
        name = publishing.shard_name(publishing.shard_prefix("documents", fingerprint, 0), len(files))
        data = document_shards.to_parquet(shard)
        storage.write_bytes(storage.join(uri, name), data)
        files.append(FileEntry.from_bytes(name, data, rows=len(shard)))
        rows, images = rows + len(shard), images + sum(len(document.images) for document in shard)
        progress(rows, parts.train + parts.held_out, f"{rows:,} examples written")
    report: dict[str, Any] = {"documents": rows, "images": images, "parts": vars(parts)}
    publishing.publish(uri, Manifest(kind=document_shards.CURATED, files=files, report=report, inputs=made_from))


def _digest(document: Document) -> bytes:
    """Of what it says: every part with its length before it."""
    digest = hashlib.blake2b(digest_size=16)
    for segment in document.segments:
        if isinstance(segment, Text):
            content = segment.text.encode("utf-8", "surrogatepass")
        else:
            content = segment.data if isinstance(segment.data, bytes) else segment.png()
        head = f"{segment.role}:{isinstance(segment, Image)}:{len(content)}:"
        digest.update(head.encode() + content)
    return digest.digest()


def _tokens(document: Document, tokenizer: TextTokenizer, image_length: int) -> int:
    """As `DocumentEncoder` encodes it, without coding its images."""
    texts = [segment.text for segment in document.segments if isinstance(segment, Text)]
    turns = sum(turn.role is not None for turn in document.turns())
    return 2 + turns + sum(map(len, tokenizer.encode_many(texts))) + len(document.images) * (image_length + 2)
