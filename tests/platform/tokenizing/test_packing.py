"""Packing: nothing is lost, nothing is cut that must stay whole, rows are full, and masks say what is trained."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.encoding import EncodedArrays, EncodedDocument
from calumma.model.vocabulary import Vocabulary
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.tokenizing.packing import ImageTooLong, pack, split

PAD = 1
VOCABULARY = Vocabulary(
    size=40, bos=0, pad=PAD, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 11))
)
IMAGE = [4, 7, 8, 9, 10, 5]
LENGTH = 16


def arrays(encoded: EncodedDocument) -> EncodedArrays:
    return EncodedArrays(np.array(encoded.ids, np.int32), np.array(encoded.trained, np.bool_))


def lists(tokens: EncodedArrays) -> EncodedDocument:
    return EncodedDocument(tokens.ids.tolist(), tokens.trained.tolist())


def packed(given: list[EncodedDocument]) -> list[PackedRow]:
    return pack([arrays(encoded) for encoded in given], LENGTH, PAD)


def cut(page: EncodedDocument, length: int = LENGTH) -> list[EncodedDocument]:
    return [lists(piece) for piece in split(arrays(page), length, VOCABULARY)]


texts = st.lists(st.integers(11, 39), max_size=12)


@st.composite
def sequences(draw: st.DrawFn, longest: int = LENGTH) -> EncodedDocument:
    ids = draw(st.lists(st.integers(11, 39), min_size=1, max_size=longest))
    return EncodedDocument(ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))


@st.composite
def pages(draw: st.DrawFn) -> EncodedDocument:
    """A plain document: bos, texts and images in any order, eos."""
    parts = draw(st.lists(texts | st.just(IMAGE), max_size=8))
    ids = [0, *(token for part in parts for token in part), 2]
    return EncodedDocument(ids, [True] * len(ids))


def unpack(row: PackedRow) -> list[EncodedDocument]:
    mask = np.ones(len(row.tokens), bool) if row.loss_mask is None else row.loss_mask
    numbers = sorted(set(row.segments.tolist()) - {-1})
    return [EncodedDocument(row.tokens[row.segments == n].tolist(), mask[row.segments == n].tolist()) for n in numbers]


@given(st.lists(sequences(), max_size=30))
def test_unpacking_gives_every_sequence_back_once(given: list[EncodedDocument]) -> None:
    rows = packed(given)
    assert sorted(s for row in rows for s in unpack(row)) == sorted(given)


@given(st.lists(sequences(), max_size=30))
def test_rows_have_one_shape_and_padding_at_their_end_is_never_trained(given: list[EncodedDocument]) -> None:
    for row in packed(given):
        assert row.tokens.shape == row.segments.shape == (LENGTH,)
        assert (row.tokens.dtype, row.segments.dtype) == (np.int32, np.int32)
        filled = LENGTH - row.padding
        assert (row.segments[:filled] >= 0).all()
        assert (np.diff(row.segments[:filled]) >= 0).all()
        assert (row.segments[filled:] == -1).all()
        assert (row.tokens[filled:] == PAD).all()
        if row.loss_mask is None:
            assert row.trained == filled
        else:
            assert row.loss_mask.dtype == np.bool_
            assert not row.loss_mask[:filled].all()
            assert not row.loss_mask[filled:].any()
            assert row.trained == row.loss_mask.sum()


@given(st.lists(sequences(), max_size=30))
def test_no_two_rows_would_fit_into_one(given: list[EncodedDocument]) -> None:
    fill = [LENGTH - row.padding for row in packed(given)]
    # Best fit opens a row only for what fits nowhere, so a later row's first sequence fits no earlier row.
    assert all(a + b > LENGTH for i, a in enumerate(fill) for b in fill[i + 1 :])


@given(st.lists(sequences(), max_size=30))
def test_packing_is_deterministic(given: list[EncodedDocument]) -> None:
    for one, other in zip(packed(given), packed(given), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.segments, other.segments)


@given(st.lists(st.integers(1, LENGTH), max_size=30))
def test_rows_and_the_sequences_in_them_come_in_the_order_of_the_input(sizes: list[int]) -> None:
    sequences = [EncodedArrays(np.full(size, n, np.int32), np.ones(size, np.bool_)) for n, size in enumerate(sizes)]
    rows = [[int(s.ids[0]) for s in map(arrays, unpack(row))] for row in pack(sequences, LENGTH, PAD)]
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_the_longest_come_first_where_that_saves_a_row() -> None:
    def fill(sizes: list[int]) -> list[list[int]]:
        sequences = [EncodedArrays(np.full(size, size, np.int32), np.ones(size, np.bool_)) for size in sizes]
        return [sorted({*row.tokens.tolist()} - {PAD}) for row in pack(sequences, LENGTH, PAD)]

    # In their order 3, 5 and 6 would share a row, and leave none that 10, 11 and 13 could fill.
    assert fill([3, 5, 6, 10, 11, 13]) == [[3, 13], [5, 11], [6, 10]]
    # Nothing is saved: 5 stays beside 10, where it came first.
    assert fill([10, 5, 11]) == [[5, 10], [11]]


def realistic(random: np.random.Generator, documents: int, pairs: float) -> list[EncodedArrays]:
    """Pairs of an image of 1024 codes and a caption, and web pages: log-normal, of 600 tokens in the median."""
    sequences = []
    for is_pair in random.random(documents) < pairs:
        size = 1026 + random.lognormal(np.log(20), 0.5) if is_pair else random.lognormal(np.log(600), 1.2)
        ids = random.integers(11, 40, 2 + int(size), dtype=np.int32)
        sequences += split(EncodedArrays(ids, np.ones(len(ids), np.bool_)), 4097, VOCABULARY)
    return [sequences[i] for i in random.permutation(len(sequences))]


@pytest.mark.parametrize(("documents", "pairs"), [(1000, 0.3), (1000, 0.1), (4000, 0.4), (4000, 0.0)])
def test_mixed_data_of_realistic_lengths_lose_less_than_a_hundredth_to_padding(documents: int, pairs: float) -> None:
    for seed in range(5):
        rows = pack(realistic(np.random.default_rng(seed), documents, pairs), 4097, PAD)
        assert sum(row.padding for row in rows) / (4097 * len(rows)) < 0.01


def test_a_sequence_goes_to_the_fullest_row_that_has_room() -> None:
    def of(size: int, token: int) -> EncodedDocument:
        return EncodedDocument([token] * size, [True] * size)

    rows = packed([of(9, 11), of(12, 12), of(4, 13)])
    assert [set(row.tokens.tolist()) for row in rows] == [{11, PAD}, {12, 13}]


@pytest.mark.parametrize("size", [0, LENGTH + 1])
def test_a_sequence_that_fits_no_row_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} tokens does not fit a row of {LENGTH}"):
        packed([EncodedDocument([11] * size, [True] * size)])


@given(pages())
def test_pieces_are_the_document_with_no_image_cut(page: EncodedDocument) -> None:
    pieces = cut(page)
    assert [token for piece in pieces for token in piece.ids] == page.ids
    for index, piece in enumerate(pieces):
        assert 0 < len(piece.ids) <= LENGTH
        assert piece.ids.count(4) == piece.ids.count(5) == sum(token in range(7, 11) for token in piece.ids) / 4
        assert piece.trained == [index == 0, *[True] * (len(piece.ids) - 1)]


@given(pages())
def test_pieces_are_as_long_as_an_image_at_their_end_allows(page: EncodedDocument) -> None:
    pieces = cut(page)
    for piece, following in pairwise(pieces):
        assert len(piece.ids) == LENGTH or (following.ids[0] == 4 and len(piece.ids) + len(IMAGE) > LENGTH)


def test_an_image_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ImageTooLong, match="more than the 5 tokens"):
        cut(EncodedDocument([0, *IMAGE, 2], [True] * 8), 5)
