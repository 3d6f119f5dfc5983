"""Every id is text, an image code or special, and no id is two of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from calumma.model import MixedModalModel
from calumma.model.vocabulary import Vocabulary


def test_every_id_is_text_image_or_special(model: MixedModalModel) -> None:
    vocabulary = model.vocabulary
    kinds = [vocabulary.special_ids, vocabulary.image_ids, vocabulary.text_ids]
    assert sorted(token for ids in kinds for token in ids) == list(range(vocabulary.size))
    for ids in kinds:
        assert vocabulary.mask(ids).nonzero()[:, 0].tolist() == ids
    assert [vocabulary.code_of[i] for i in vocabulary.image_codes] == list(range(len(vocabulary.image_codes)))


def test_the_public_releases_ids_fit() -> None:
    vocabulary = Vocabulary(
        size=65536,
        bos=0,
        pad=1,
        eos=2,
        unknown=3,
        image_codes=list(range(4, 8196)),
        end_image=8196,
        begin_image=8197,
        end_turn=8710,
    )
    assert len(vocabulary.text_ids) == 65536 - 8192 - 7


def test_an_id_with_two_meanings_is_refused() -> None:
    with pytest.raises(ValidationError, match="given twice"):
        Vocabulary(size=10, bos=0, pad=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=[6, 7])
