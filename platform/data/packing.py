"""Packing: encoded documents -> rows of one fixed length, best fit, no image cut (paper section 3.1).

A sequence longer than a row is first `split` (plain documents) or left out (conversations: half a conversation is
an answer without its question).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calumma.model.encoding import Encoded
from calumma.model.vocabulary import Vocabulary

PADDING_SEGMENT = -1


@dataclass(frozen=True)
class PackedRow:
    """One row of a token shard. `loss_mask` None means that every token is trained."""

    tokens: NDArray[np.int32]  # [length]
    loss_mask: NDArray[np.bool_] | None  # [length]
    segments: NDArray[np.int32]  # [length], document number within the row, -1 for padding

    @property
    def padding(self) -> int:
        return int((self.segments == PADDING_SEGMENT).sum())

    @property
    def trained(self) -> int:
        return len(self.tokens) if self.loss_mask is None else int(self.loss_mask.sum())


class ImageTooLong(ValueError):
    """A single image needs more tokens than a row has."""


def split(sequence: Encoded, length: int, vocabulary: Vocabulary) -> list[Encoded]:
    """Pieces of at most `length` tokens that together are the sequence, cut between text tokens or beside images.

    The first token of every later piece is not trained: what it followed is in another row. Raises ImageTooLong.
    """
    ids, trained = sequence
    pieces = []
    begin = 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        if end < len(ids):
            end = _outside_image(ids, begin, end, vocabulary)
        if end == begin:
            raise ImageTooLong(f"an image in the document needs more than the {length} tokens of a row")
        mask = trained[begin:end]
        if begin:
            mask = [False, *mask[1:]]
        pieces.append(Encoded(ids[begin:end], mask))
        begin = end
    return pieces


def _outside_image(ids: Sequence[int], begin: int, end: int, vocabulary: Vocabulary) -> int:
    """The last place to cut at or before `end` that is not between an image's begin and end."""
    for index in range(end - 1, begin - 1, -1):
        if ids[index] == vocabulary.end_image:
            return end
        if ids[index] == vocabulary.begin_image:
            return index
    return end


def pack(sequences: Sequence[Encoded], length: int, pad: int) -> list[PackedRow]:
    """Put every sequence, whole, into one row: the fullest that still has room, else a new one.

    Sequences are taken in the given order and rows come in the order they were begun, so a shuffled input gives
    mixed rows (sorting by length, which packs a little tighter, would put like beside like). Raises ValueError for
    an empty sequence and for one longer than `length`.
    """
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that fits is the fullest
    for sequence in sequences:
        size = len(sequence.ids)
        if not 0 < size <= length:
            raise ValueError(f"a sequence of {size} tokens does not fit a row of {length}")
        place = bisect_left(room, (size, 0))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(sequence)
        if free > size:
            insort(room, (free - size, row))
    return [_row(row, length, pad) for row in rows]


def _row(sequences: Sequence[Encoded], length: int, pad: int) -> PackedRow:
    tokens = np.full(length, pad, dtype=np.int32)
    mask = np.zeros(length, dtype=np.bool_)
    segments = np.full(length, PADDING_SEGMENT, dtype=np.int32)
    begin = 0
    for number, sequence in enumerate(sequences):
        end = begin + len(sequence.ids)
        tokens[begin:end] = sequence.ids
        mask[begin:end] = sequence.trained
        segments[begin:end] = number
        begin = end
    return PackedRow(tokens, None if mask.all() else mask, segments)
