"""Text round trips, and nothing that a user types becomes a special or image id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calumma.model import MixedModalModel
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
symbols = st.sampled_from(
    [
        "<image>",
        "</image>",
        "<end_turn>",
        "<image:3>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<0x41>",
        "▁",
        "\0",
        "IMGIMGAAAAZ",
    ]
)


@given(text=any_text)
@example(text="<racm3:break>IMGIMGAAAAZ<eoss>")
@example(text="▁a ▁ \0 b\u2028\r\n")
def test_any_text_round_trips(model: MixedModalModel, text: str) -> None:
    assert model.text_tokenizer.decode(model.text_tokenizer.encode(text)) == text


@given(parts=st.lists(symbols | any_text, max_size=6))
def test_user_text_is_only_text_ids(model: MixedModalModel, parts: list[str]) -> None:
    assert set(model.text_tokenizer.encode("".join(parts))) <= set(model.vocabulary.text_ids)


@given(texts=st.lists(symbols | any_text | st.just("plain words"), max_size=8))
def test_many_texts_become_what_each_becomes_alone(model: MixedModalModel, texts: list[str]) -> None:
    encoded = model.text_tokenizer.encode_many(texts)
    assert [ids.tolist() for ids in encoded] == [model.text_tokenizer.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


@given(text=any_text)
def test_streaming_never_shows_a_broken_character(model: MixedModalModel, text: str) -> None:
    stream = model.text_tokenizer.stream_decoder()
    shown = ""
    for token in model.text_tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_a_truncated_character_is_replaced_at_the_end(model: MixedModalModel) -> None:
    ids = model.text_tokenizer.encode("é")
    assert model.text_tokenizer.decode(ids[:1]) == "\ufffd"


def test_lone_surrogates_are_refused(model: MixedModalModel) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        model.text_tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="not valid Unicode"):
        model.text_tokenizer.encode_many(["a", "a\ud800"])


def test_every_digit_is_an_id_of_its_own_however_often_a_number_occurs(tmp_path: Path) -> None:
    train_text_tokenizer(["in 2024 as in 2024 and 1999\n" * 50], tmp_path, vocabulary_size=284, image_codes=4)
    tokenizer = TextTokenizer.read(tmp_path)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2024")] == ["2", "0", "2", "4"]
    assert len(tokenizer.encode(" and")) < 4


def test_the_vocabulary_has_the_size_asked_for_image_codes_and_bytes_among_it(model: MixedModalModel) -> None:
    assert model.vocabulary.size == model.text_tokenizer.size == 400
    assert len(model.vocabulary.image_ids) == 32
    assert len(model.text_tokenizer.encode("字")) == 3  # a character it never saw, as its bytes


def test_too_little_text_for_the_vocabulary_is_a_clear_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="no BPE vocabulary of 5000 ids"):
        train_text_tokenizer(["abc"], tmp_path, vocabulary_size=5000, image_codes=4)
