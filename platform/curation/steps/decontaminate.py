"""Evaluation sets kept out of training data: documents that share a run of words (13 by default, as GPT-3's authors
counted) or an image with one of them.

The index is small, 8 bytes a run of words of the evaluation sets: it is built once and read by every task.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.curation.specification import Decontamination
from calumma.platform.curation.steps.filters import Dropped, Rule
from calumma.platform.curation.steps.signatures import image_hash
from calumma.platform.curation.steps.words import Hashes, all_text, hashes, ngrams, words
from calumma.platform.specification import SpecificationError

SUFFIXES = (".jsonl", ".json", ".txt")
Index = dict[str, Hashes]  # "evaluation set/words in a run", or "evaluation set/images" -> sorted


def build_index(task: dict[str, Any]) -> dict[str, Any]:
    """Index the evaluation sets and write the index. Raises SpecificationError and StorageError.

    `task`: "rules", "against" (URIs), "index" (where to write it). Returns {"runs": how many}.
    """
    rules = Decontamination.model_validate(task["rules"])
    index: Index = {}
    for number, uri in enumerate(task["against"]):
        hashes_of_length: dict[str, list[Hashes]] = {}
        for text, document in _evaluation_texts(uri):
            hashed = hashes(words(text))
            length = min(rules.ngram, len(hashed))
            if length >= min(rules.shortest, rules.ngram):
                hashes_of_length.setdefault(str(length), []).append(ngrams(hashed, length))
            if document is not None and document.images and rules.image_distance is not None:
                pictures = [image_hash(image.open()) for image in document.images]
                hashes_of_length.setdefault("images", []).append(np.array(pictures, np.uint64))
        if not hashes_of_length:
            raise SpecificationError(
                f"decontaminate.against: {uri} holds no text of {rules.shortest} words or more; see `shortest`"
            )
        index |= {f"{number}/{kind}": np.unique(np.concatenate(parts)) for kind, parts in hashes_of_length.items()}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **index)
    storage.write_bytes(task["index"], buffer.getvalue())
    return {"runs": sum(map(len, index.values()))}


def _evaluation_texts(uri: str) -> Iterator[tuple[str, Document | None]]:
    """Texts of an evaluation set; of a curated directory with their documents."""
    from calumma.platform.shards import documents as document_shards
    from calumma.platform.storage.manifest import Manifest

    manifest = Manifest.find(uri) if PurePosixPath(uri).suffix.lower() not in SUFFIXES else None
    if manifest is not None:
        yield from ((all_text(document), document) for document in document_shards.read_documents(uri))
        return
    files = [file for file in storage.list_files(uri) if PurePosixPath(file).suffix.lower() in SUFFIXES]
    if not files:
        raise SpecificationError(
            f"decontaminate.against: {uri} is no curated directory, and there are no {' or '.join(SUFFIXES)} files"
        )
    for file in files:
        yield from ((text, None) for text in _texts(file))


def _texts(uri: str) -> Iterator[str]:
    if uri.lower().endswith(".json"):
        yield from _strings(_parsed(storage.read_bytes(uri), uri))
        return
    with storage.open_read(uri) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if uri.lower().endswith(".jsonl"):
                yield from _strings(_parsed(line, f"{uri}: line {number}"))
            else:
                yield line.decode("utf-8", "replace")


def _parsed(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SpecificationError(f"decontaminate.against: {name} is no JSON: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value: the fields of benchmarks have all kinds of names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


# -- one document ------------------------------------------------------------------------------------------------------


def overlap_rule(rules: Decontamination, names: list[str], index_uri: str) -> Rule:
    """Drops documents that share something with an evaluation set; `names` are the sets' names, for the reason."""
    index = _read_index(index_uri)

    def rule(document: Document) -> Document | Dropped:
        hashed = hashes(words(all_text(document)))
        runs: dict[int, Hashes] = {}
        pictures: Hashes | None = None
        for key, known in index.items():
            number, _, kind = key.partition("/")
            name = names[int(number)]
            if kind == "images":
                if pictures is None:
                    pictures = np.array([image_hash(image.open()) for image in document.images], np.uint64)
                if any(np.bitwise_count(known ^ one).min() <= (rules.image_distance or 0) for one in pictures):
                    return Dropped(f"image of {name}", "decontaminate")
                continue
            length = int(kind)
            if length not in runs:
                runs[length] = ngrams(hashed, length)
            if _overlap(runs[length], known):
                return Dropped(f"{length} words of {name}", "decontaminate")
        return document

    return rule


def _overlap(hashed: Hashes, known: Hashes) -> bool:
    places = np.minimum(np.searchsorted(known, hashed), len(known) - 1)
    return bool((known[places] == hashed).any())


@functools.lru_cache(maxsize=2)
def _read_index(uri: str) -> Index:
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}
