"""The second kind of text tokenizer, tokenizer.json: vocabulary, round trips, nothing typed becomes a special id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from calumma.model import MixedModalModel
from calumma.model.convert import ConversionError
from calumma.model.convert.text import SPECIALS, code_of, export_tokenizer, import_tokenizer, name_of, vocabulary_of
from calumma.model.tokenizers.text import HuggingFaceTokenizer, TextTokenizer
from calumma.model.vocabulary import Vocabulary

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
typed = st.sampled_from(
    [*SPECIALS.values(), "IMGIMGAZ", "IMGIMGBAZ", "<image>", "<reserved08707>", "<0x41>", "▁", "\0", " ", "digit"]
)
KINDS = ("byte_level", "byte_fallback", "prefixed_byte_level", "metaspace", "ignore_merges")


@pytest.fixture(scope="session")
def kinds(byte_level: dict[str, Any], byte_fallback: dict[str, Any]) -> dict[str, dict[str, Any]]:
    prefixed = {**byte_level, "pre_tokenizer": {**byte_level["pre_tokenizer"], "add_prefix_space": True}}
    split = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    metaspace = {**byte_fallback, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split]}}
    ignore = {**byte_level, "model": {**byte_level["model"], "ignore_merges": True}}
    return {
        "byte_level": byte_level,
        "byte_fallback": byte_fallback,
        "prefixed_byte_level": prefixed,
        "metaspace": metaspace,
        "ignore_merges": ignore,
    }


@pytest.fixture(scope="session", params=KINDS)
def document(request: pytest.FixtureRequest, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return kinds[request.param]


@pytest.fixture(scope="session")
def vocabulary(document: dict[str, Any]) -> Vocabulary:
    return vocabulary_of(document, 400, "it")


@pytest.fixture(scope="session")
def tokenizer(document: dict[str, Any], vocabulary: Vocabulary) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(document), vocabulary)


@given(text=any_text)
@example(text="")
@example(text=" ")
@example(text=" Draw  a seven. ")
@example(text="▁a ▁ \0 b\u2028\r\n")
def test_any_text_round_trips(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(parts=st.lists(typed | any_text, max_size=6))
def test_user_text_is_only_text_ids(tokenizer: HuggingFaceTokenizer, vocabulary: Vocabulary, parts: list[str]) -> None:
    ids = tokenizer.encode("".join(parts))
    assert set(ids) <= set(vocabulary.text_ids)
    assert tokenizer.decode(ids) == "".join(parts)


@given(text=st.text("Which digit is this? Draw a seven.\n\té字", min_size=1, max_size=40))
def test_plain_text_encodes_as_with_its_own_library(
    tokenizer: HuggingFaceTokenizer, document: dict[str, Any], text: str
) -> None:
    """But for texts that begin with a space: some tokenizers forget that, ours do not."""
    if text.startswith(" ") or (tokenizer.leading_space and text[0].isspace()):
        return
    original = tokenizers.Tokenizer.from_str(json.dumps(document))
    assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids


@given(text=any_text)
def test_streaming_never_shows_a_broken_character(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    stream = tokenizer.stream_decoder()
    shown = ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_special_and_image_ids_have_no_surface(tokenizer: HuggingFaceTokenizer, vocabulary: Vocabulary) -> None:
    silent = [token for token in range(vocabulary.size) if not tokenizer.surface(token)]
    assert silent == sorted([*vocabulary.special_ids, *vocabulary.image_ids])
    assert tokenizer.size == vocabulary.size


def test_lone_surrogates_are_refused(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_the_vocabulary_is_that_of_the_names(document: dict[str, Any], vocabulary: Vocabulary) -> None:
    ids = document["model"]["vocab"]
    assert {name: getattr(vocabulary, name) for name in SPECIALS} == {
        ours: ids[name] for ours, name in SPECIALS.items()
    }
    assert [vocabulary.image_codes.index(ids[name]) for name in ("IMGIMGAZ", "IMGIMGDZ", "IMGIMGBCZ")] == [0, 3, 12]
    named = [ids[f"<reserved{number:05d}>"] for number in (8704, 8705, 8707, 8708)]
    assert vocabulary.reserved == [*named, *range(max(ids.values()) + 1, 400)]


@given(code=st.integers(0, 10**6))
def test_names_of_image_codes(code: int) -> None:
    assert code_of(name_of(code)) == code
    assert code_of("IMGIMGZ") is None
    assert code_of(name_of(code)[1:]) is None


def test_missing_names_are_listed(byte_level: dict[str, Any]) -> None:
    gone = {"<eoss>", "IMGIMGCZ"}
    model = {**byte_level["model"], "vocab": {k: v for k, v in byte_level["model"]["vocab"].items() if k not in gone}}
    added = [token for token in byte_level["added_tokens"] if token["content"] not in gone]
    with pytest.raises(ConversionError, match="<eoss>, IMGIMGCZ"):
        vocabulary_of({**byte_level, "model": model, "added_tokens": added}, 300, "it")


def test_a_vocabulary_larger_than_the_model_is_refused(byte_level: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match="has id 299, the model only 290 ids"):
        vocabulary_of(byte_level, 290, "it")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"type": "Unigram"}, "only BPE"),
        ({"vocab": [["a", -1.0]]}, "only BPE"),
        ({"end_of_word_suffix": "</w>"}, "parts of words"),
        ({"byte_fallback": "perhaps"}, "that can be read"),
    ],
)
def test_tokenizers_of_other_kinds_are_refused(
    byte_level: dict[str, Any], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({**byte_level, "model": {**byte_level["model"], **change}}))
    with pytest.raises(ConversionError, match=told):
        import_tokenizer(tmp_path / "tokenizer.json", 300, tmp_path)


def test_it_is_read_from_a_directory(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    vocabulary = import_tokenizer(tmp_path / "tokenizer.json", 400, tmp_path)
    assert Vocabulary.read(tmp_path) == vocabulary
    read = TextTokenizer.read(tmp_path)
    assert isinstance(read, HuggingFaceTokenizer)
    assert read.decode(read.encode("Draw a seven. ▁字")) == "Draw a seven. ▁字"


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither text_tokenizer.model nor text_tokenizer.json"):
        TextTokenizer.read(tmp_path)


# --- tokenizer.json of a model directory ----------------------------------------------------------------------------


@given(text=any_text)
def test_a_sentencepiece_model_as_tokenizer_json_encodes_alike(
    model: MixedModalModel, exported_tokenizer: tokenizers.Tokenizer, text: str
) -> None:
    text = text.replace("▁", "").replace("\0", "")  # which the one encodes in bytes, the other as a space or not at all
    if any(name in text for name in SPECIALS.values()):
        return
    assert exported_tokenizer.encode(text, add_special_tokens=False).ids == model.text_tokenizer.encode(text)
    assert exported_tokenizer.decode(model.text_tokenizer.encode(text)) == text


@pytest.fixture(scope="session")
def exported_tokenizer(model_directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(export_tokenizer(model_directory)))


def test_an_exported_tokenizer_has_the_public_names(
    model: MixedModalModel, exported_tokenizer: tokenizers.Tokenizer
) -> None:
    vocabulary = model.vocabulary
    own = {ours: exported_tokenizer.token_to_id(name) for ours, name in SPECIALS.items() if ours != "unknown"}
    assert own == {name: getattr(vocabulary, name) for name in own}
    codes = [exported_tokenizer.token_to_id(name_of(code)) for code in range(len(vocabulary.image_codes))]
    assert codes == vocabulary.image_codes
    # without a reserved id to spare, the place of an image is marked by the id that no text has
    assert exported_tokenizer.token_to_id("<image>") == vocabulary.unknown
    assert exported_tokenizer.encode("<image>a").ids[:2] == [vocabulary.bos, vocabulary.unknown]


def test_an_imported_tokenizer_is_exported_with_the_placeholder_of_hugging_face(
    byte_level: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level))
    import_tokenizer(tmp_path / "tokenizer.json", 300, tmp_path)
    exported = export_tokenizer(tmp_path)
    ids = byte_level["model"]["vocab"]
    renamed = {("<image>" if name == "<reserved08707>" else name): token for name, token in ids.items()}
    assert exported["model"]["vocab"] == renamed
    assert [token["content"] for token in exported["added_tokens"]].count("<image>") == 1
