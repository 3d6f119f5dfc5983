"""Duplicates across all sources: tasks that each compare the documents whose keys are in one range.

Which documents are dropped depends on the documents alone: rows of one key meet in one task however many tasks there
are, and are taken in the order of the documents' identities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.curation.specification import DuplicateRules
from calumma.platform.curation.steps import staging
from calumma.platform.curation.steps.signatures import KINDS, SignatureRows, add_signatures, similarity

ROWS_PER_FILE = 200_000  # of signatures, which a task holds until it writes them
ROWS_PER_TASK = 1_000_000  # of signatures that are compared in one go; some 400 MB at the peak
_BLOCK = 1024  # image hashes compared with all others at a time

Ids = NDArray[np.uint64]
Pairs = tuple[Ids, Ids]  # documents to drop, and beside each the earlier one it is like


# -- signatures, from the tasks that read documents --------------------------------------------------------------------


class SignatureWriter:
    """Collects signatures of one task and writes them in files of bounded size. Raises StorageError."""

    def __init__(self, root: str, stem: str) -> None:
        self._root, self._stem = root, stem
        self.rows = {kind: SignatureRows() for kind in KINDS}
        self.written = dict.fromkeys(KINDS, 0)
        self._files = 0

    def add(self, document: Document, identity: int, rules: DuplicateRules) -> None:
        """Add a document's signatures."""
        add_signatures(document, identity, rules, self.rows)
        self.flush(above=ROWS_PER_FILE)

    def flush(self, above: int = 0) -> None:
        """Write what has more rows than that."""
        for kind, rows in self.rows.items():
            if len(rows) > above:
                uri = storage.join(self._root, staging.SIGNATURES, kind, f"{self._stem}-{self._files:05d}.parquet")
                staging.write_table(uri, {"key": rows.keys, "id": rows.ids, "value": rows.values})
                self.written[kind] += len(rows)
                self._files += 1
                self.rows[kind] = SignatureRows()


# -- tasks -------------------------------------------------------------------------------------------------------------


def comparison_tasks(root: str, output: str, rules: DuplicateRules, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tasks for `find_duplicates`, by the number of rows of every kind."""
    tasks = []
    for kind in KINDS:
        count = -(-rows.get(kind, 0) // ROWS_PER_TASK)
        edges = [(n << 64) // count for n in range(count + 1)] if count else []
        tasks += [
            {
                "kind": kind,
                "number": number,
                "low": edges[number],
                "high": edges[number + 1],
                "root": root,
                "output": output,
                "rules": rules.model_dump(mode="json"),
            }
            for number in range(count)
        ]
    return tasks


def find_duplicates(task: dict[str, Any]) -> dict[str, Any]:
    """Compare the signatures of one kind in one range of keys and write which documents go. Raises StorageError.

    `task`: as `comparison_tasks` makes it. Returns {"pairs": how many were found}.
    """
    kind = task["kind"]
    rules = DuplicateRules.model_validate(task["rules"])
    files = storage.list_files(storage.join(task["root"], staging.SIGNATURES, kind))
    table = staging.read_tables(files, task["low"], task["high"])
    if not table:
        return {"pairs": 0}
    order = np.lexsort((table["id"], table["key"]))
    keys, ids, values = (table[name][order] for name in ("key", "id", "value"))
    if kind == "exact":
        dropped, of = _equal_documents(keys, ids, values)
    elif kind == "near":
        assert rules.near is not None
        dropped, of = _concatenated(_similar_texts(ids[g], values[g], rules.near.similarity) for g in _groups(keys))
    else:
        assert rules.images is not None
        dropped, of = _concatenated(_similar_images(ids[g], values[g], rules.images.distance) for g in _groups(keys))
    if len(dropped):
        uri = storage.join(task["root"], staging.DROPS, f"{kind}-{task['number']:05d}.parquet")
        columns = {"id": dropped, "of": of, "kind": np.full(len(of), KINDS.index(kind), np.uint8)}
        staging.write_table(uri, columns)
    return {"pairs": len(dropped)}


def _groups(keys: Ids) -> Iterator[slice]:
    """Runs of two or more equal keys."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    ends = np.r_[starts[1:], len(keys)]
    for begin, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield slice(int(begin), int(end))


def _concatenated(pairs: Iterator[Pairs]) -> Pairs:
    found = list(pairs)
    if not found:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _equal_documents(keys: Ids, ids: Ids, values: Ids) -> Pairs:
    """All but the first of equal (key, value)."""
    order = np.lexsort((ids, values, keys))
    keys, ids, values = keys[order], ids[order], values[order]
    first = np.r_[True, (keys[1:] != keys[:-1]) | (values[1:] != values[:-1])]
    leader = np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))
    return ids[~first], ids[leader[~first]]


def _similar_texts(ids: Ids, sketches: NDArray[np.uint8], threshold: float) -> Pairs:
    """Of one band's documents those that are similar to an earlier one which stays: the first stays and what is similar
    to it goes; then the first of the rest, and so on."""
    dropped, of = [], []
    left = np.arange(len(ids))
    while len(left) > 1:
        leader, others = left[0], left[1:]
        similar = similarity(sketches[leader], sketches[others]) >= threshold
        dropped.append(ids[others[similar]])
        of.append(np.full(int(similar.sum()), ids[leader], np.uint64))
        left = others[~similar]
    return np.concatenate(dropped), np.concatenate(of)


def _similar_images(ids: Ids, values: Ids, distance: int) -> Pairs:
    """Of one key's images those that are close to any earlier one."""
    # Images of one hash are one: a picture that stands in a million documents is compared once.
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    repeats = first[which] != np.arange(len(ids))
    dropped, of = [ids[repeats]], [ids[first[which[repeats]]]]
    places = np.sort(first)
    hashed, owners = values[places], ids[places]
    for begin in range(0, len(hashed), _BLOCK):
        block = hashed[begin : begin + _BLOCK]
        near = np.bitwise_count(block[:, None] ^ hashed[None, : begin + len(block)]) <= distance
        near &= np.arange(near.shape[1])[None, :] < (begin + np.arange(len(block)))[:, None]
        matched = near.any(axis=1)
        dropped.append(owners[begin : begin + _BLOCK][matched])
        of.append(owners[near[matched].argmax(axis=1)])
    return np.concatenate(dropped), np.concatenate(of)


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Duplicate:
    """Why a document is dropped: the kind of likeness, and the identity of an earlier document."""

    kind: str
    of: int

    @property
    def reason(self) -> str:
        return {"exact": "exact duplicate", "near": "near duplicate", "images": "duplicate image"}[self.kind]


def read_duplicates(root: str, low: int, high: int) -> dict[int, Duplicate]:
    """Identity -> why it is dropped, of documents in [low, high): the first kind of reason. Raises StorageError."""
    table = staging.read_tables(storage.list_files(storage.join(root, staging.DROPS)), low, high)
    if not table:
        return {}
    order = np.lexsort((table["of"], table["kind"], table["id"]))
    ids, of, kinds = (table[name][order] for name in ("id", "of", "kind"))
    first = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    return {int(ids[n]): Duplicate(KINDS[kinds[n]], int(of[n])) for n in first}
