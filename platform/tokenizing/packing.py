"""Packing: encoded documents -> rows of one fixed length, best fit, no image cut (paper section 3.1).

A sequence longer than a row is first `split` (plain documents) or left out (conversations: half a conversation is
an answer without its question).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from calumma.model.encoding import EncodedArrays
from calumma.model.vocabulary import Vocabulary
from calumma.platform.shards.tokens import PADDING_SEGMENT, PackedRow


class ImageTooLong(ValueError):
    """A single image needs more tokens than a row has."""


def split(sequence: EncodedArrays, length: int, vocabulary: Vocabulary) -> list[EncodedArrays]:
    """Pieces of at most `length` tokens that together are the sequence, cut between text tokens or beside images.

    The first token of every later piece is not trained: what it followed is in another row. Raises ImageTooLong.
    """
    ids, trained = sequence
    pieces = []
    begin = 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        if end < len(ids):
            end = _cut_outside_image(ids, begin, end, vocabulary)
        if end == begin:
            raise ImageTooLong(f"an image in the document needs more than the {length} tokens of a row")
        mask = trained[begin:end]
        if begin:
            mask = mask.copy()
            mask[0] = False
        pieces.append(EncodedArrays(ids[begin:end], mask))
        begin = end
    return pieces


def _cut_outside_image(ids: NDArray[np.int32], begin: int, end: int, vocabulary: Vocabulary) -> int:
    """The last place to cut at or before `end` that is not between an image's begin and end."""
    piece = ids[begin:end]
    marks = np.flatnonzero((piece == vocabulary.begin_image) | (piece == vocabulary.end_image))
    if len(marks) and piece[marks[-1]] == vocabulary.begin_image:
        return begin + int(marks[-1])
    return end


def pack(sequences: Sequence[EncodedArrays], length: int, pad: int, alone: bool = False) -> list[PackedRow]:
    """Put every sequence, whole, into one row: the fullest that still has room, else a new one; or each `alone`.

    Taken in the given order, a shuffled input gives mixed rows. Taken longest first (arXiv 2404.10830, section 2.2)
    the short ones fill what the long ones leave, but like comes beside like: that is done where it needs fewer rows.
    Rows, and the sequences in a row, come in the order of the input. Raises ValueError for an empty sequence and for
    one longer than `length`.
    """
    sizes = [len(sequence.ids) for sequence in sequences]
    for size in sizes:
        if not 0 < size <= length:
            raise ValueError(f"a sequence of {size} tokens does not fit a row of {length}")
    if alone:
        return [packed_row([sequence], length, pad) for sequence in sequences]
    rows = best_fit(sizes, range(len(sizes)), length)
    if (len(rows) - 1) * length >= sum(sizes):
        fuller = best_fit(sizes, sorted(range(len(sizes)), key=lambda i: -sizes[i]), length)
        if len(fuller) < len(rows):
            rows = sorted(sorted(row) for row in fuller)
    return [packed_row([sequences[i] for i in row], length, pad) for row in rows]


def best_fit(sizes: Sequence[int], order: Iterable[int], length: int) -> list[list[int]]:
    """Rows of sequence numbers; each sequence, in `order`, goes where it leaves the least room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that fits is the fullest
    for number in order:
        size = sizes[number]
        place = bisect_left(room, (size, 0))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(number)
        if free > size:
            insort(room, (free - size, row))
    return rows


def packed_row(sequences: Sequence[EncodedArrays], length: int, pad: int) -> PackedRow:
    """One row of these sequences, one after the other, filled up with padding."""
    sizes = [len(sequence.ids) for sequence in sequences]
    filled = sum(sizes)
    tokens = np.full(length, pad, dtype=np.int32)
    np.concatenate([sequence.ids for sequence in sequences], out=tokens[:filled])
    mask = np.zeros(length, dtype=np.bool_)
    np.concatenate([sequence.trained for sequence in sequences], out=mask[:filled])
    segments = np.full(length, PADDING_SEGMENT, dtype=np.int32)
    segments[:filled] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return PackedRow(tokens, None if mask[:filled].all() else mask, segments)
