"""The id space of the public release, from its tokenizer.json, and tokenizer.json of any model directory.

Names: `IMGIMG` + the code's decimal digits as letters A..J + `Z` is an image code; the other special names stand in
SPECIALS. Hugging Face's processor puts `<image>` where an image's codes will stand; it took the place of a reserved
name for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from calumma.model.convert.names import ConversionError, abridged
from calumma.model.tokenizers.text import SPACE, HuggingFaceTokenizer, SentencepieceTokenizer, TextTokenizer
from calumma.model.vocabulary import Vocabulary

# Our name of a special id -> its name in the public release.
SPECIALS = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "unknown": "<unk>",
    "begin_image": "<racm3:break>",
    "end_image": "<eoss>",
    "end_turn": "<reserved08706>",
}
PLACEHOLDER, PLACEHOLDERS_OLD_NAME = "<image>", "<reserved08707>"
IMAGE_CODE = re.compile(r"IMGIMG([A-J]+)Z")
RESERVED = re.compile(r"<reserved\d+>")
LETTERS, DIGITS = "ABCDEFGHIJ", "0123456789"


def code_of(name: str) -> int | None:
    """The image code that a name of the vocabulary stands for, or None."""
    found = IMAGE_CODE.fullmatch(name)
    return int(found[1].translate(str.maketrans(LETTERS, DIGITS))) if found else None


def name_of(code: int) -> str:
    """The public release's name of an image code."""
    return f"IMGIMG{str(code).translate(str.maketrans(DIGITS, LETTERS))}Z"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConversionError when the file is missing or is no JSON object."""
    if not path.is_file():
        raise ConversionError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def names(tokenizer: dict[str, Any]) -> dict[str, int]:
    """All names of a tokenizer.json, of its model and of its added tokens, with their ids."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return {**tokenizer["model"]["vocab"], **added}


def vocabulary_of(tokenizer: dict[str, Any], size: int, where: str, separator: str | None = None) -> Vocabulary:
    """The id space of a tokenizer.json for a model of `size` ids. separator: what ends a turn where the release's name
    for it is missing.

    Added tokens that no table names, names `<reserved...>` and ids without a name are reserved: no text. Raises
    ConversionError that lists special names and image codes that are missing.
    """
    if not isinstance((tokenizer.get("model") or {}).get("vocab"), dict):
        raise ConversionError(f"{where} has no vocabulary by name (model.vocab); only BPE tokenizers can be read")
    ids = names(tokenizer)
    if PLACEHOLDER in ids:
        ids.setdefault(SPECIALS["unknown"], ids[PLACEHOLDER])  # as `export_tokenizer` writes it without a reserved id
    named = dict(SPECIALS)
    if named["end_turn"] not in ids and separator is not None:
        named["end_turn"] = separator
    codes = {code: token for name, token in ids.items() if (code := code_of(name)) is not None}
    missing = [name for name in named.values() if name not in ids]
    missing += [name_of(code) for code in range(max(codes, default=0)) if code not in codes]
    if missing or not codes:
        lacking = abridged(missing) if missing else "the image codes IMGIMG...Z"
        hint = "; sep_token in tokenizer_config.json may name it" if missing == [SPECIALS["end_turn"]] else ""
        raise ConversionError(f"{where}: names of the public release's vocabulary are missing: {lacking}{hint}")
    if max(ids.values()) >= size:
        raise ConversionError(f"{where} has id {max(ids.values())}, the model only {size} ids")
    taken = {*codes.values(), *(ids[name] for name in named.values())}
    reserved = {token["id"] for token in tokenizer.get("added_tokens") or []}
    reserved |= {token for name, token in ids.items() if RESERVED.fullmatch(name) or name == PLACEHOLDER}
    reserved |= set(range(size)) - set(ids.values())
    return Vocabulary(
        size=size,
        **{ours: ids[theirs] for ours, theirs in named.items()},
        image_codes=[codes[code] for code in range(len(codes))],
        reserved=sorted(reserved - taken),
    )


def import_tokenizer(path: Path, size: int, destination: Path) -> Vocabulary:
    """Write `text_tokenizer.json` and `vocabulary.json` from a tokenizer.json. Raises ConversionError."""
    settings = path.with_name("tokenizer_config.json")
    separator = read_json(settings).get("sep_token") if settings.is_file() else None
    separator = separator.get("content") if isinstance(separator, dict) else separator
    vocabulary = vocabulary_of(read_json(path), size, str(path), separator)
    try:
        tokenizer = HuggingFaceTokenizer(path.read_text(encoding="utf-8"), vocabulary)
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error
    tokenizer.save(destination)
    vocabulary.save(destination)
    return vocabulary


def export_tokenizer(directory: Path) -> dict[str, Any]:
    """tokenizer.json of a model directory, with the public release's names, whatever the kind of its tokenizer."""
    tokenizer, vocabulary = TextTokenizer.read(directory), Vocabulary.read(directory)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        document: dict[str, Any] = json.loads(tokenizer.content)
        known = SPECIALS["end_turn"] in names(document)
        renamed = {} if known else {vocabulary.end_turn: SPECIALS["end_turn"]}
    else:
        assert isinstance(tokenizer, SentencepieceTokenizer)
        document = _of_sentencepiece(tokenizer.processor, vocabulary)
        renamed = {getattr(vocabulary, ours): theirs for ours, theirs in SPECIALS.items()}
        renamed |= {token: name_of(code) for code, token in enumerate(vocabulary.image_codes)}
    ids = names(document)
    if renamed or PLACEHOLDER not in ids:
        # A reserved id, the one that Hugging Face took if it is there; without any, the unknown one, which no text has.
        spare = ids.get(PLACEHOLDERS_OLD_NAME, next(iter(vocabulary.reserved), vocabulary.unknown))
        renamed[spare] = PLACEHOLDER
    _rename(document, renamed)
    if document.get("post_processor") is None:
        document["post_processor"] = _begins_with(SPECIALS["bos"], vocabulary.bos)
    return document


def _begins_with(name: str, token: int) -> dict[str, Any]:
    """A post-processor that puts a token before every text, as transformers expects of Chameleon's."""
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _rename(document: dict[str, Any], renamed: dict[int, str]) -> None:
    """Give ids of a tokenizer.json new names, as special added tokens."""
    model = document["model"]
    kept = {name: token for name, token in model["vocab"].items() if token not in renamed}
    unknown = model["vocab"].get(model.get("unk_token"))
    model["unk_token"] = renamed.get(unknown, model.get("unk_token"))
    model["vocab"] = dict(sorted((kept | {name: token for token, name in renamed.items()}).items(), key=lambda x: x[1]))
    added = {token["id"]: token for token in document.get("added_tokens") or []}
    for token, name in renamed.items():
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added[token] = {"id": token, **plain, "special": True, **added.get(token, {}), "content": name}
    document["added_tokens"] = [added[token] for token in sorted(added)]


def _of_sentencepiece(processor: sentencepiece.SentencePieceProcessor, vocabulary: Vocabulary) -> dict[str, Any]:
    """A BPE tokenizer.json that encodes as our sentencepiece models do: unknown characters in bytes, none changed."""
    pieces = {processor.id_to_piece(token): token for token in range(processor.get_piece_size())}
    rank = {token: -processor.get_score(token) for token in pieces.values()}
    mergeable = {token for token in vocabulary.text_ids if not processor.is_byte(token)}
    text = {piece: token for piece, token in pieces.items() if token in mergeable}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return bpe_document(processor, pieces, text, rank, space, added=[], fuse_unk=False)


def bpe_document(
    processor: sentencepiece.SentencePieceProcessor,
    pieces: dict[str, int],
    mergeable: dict[str, int],
    rank: dict[int, float],
    normalizer: dict[str, Any],
    added: list[dict[str, Any]],
    fuse_unk: bool,
) -> dict[str, Any]:
    """A tokenizer.json of a sentencepiece BPE model that falls back to bytes. pieces: all, with their ids. mergeable:
    those that pairs of them are merged into, in the order of their `rank`."""
    merges = sorted(
        (rank[token], left, right) for piece, token in mergeable.items() for left, right in splits(piece, mergeable)
    )
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": fuse_unk,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": pieces,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def splits(piece: str, pieces: dict[str, int]) -> Iterator[tuple[str, str]]:
    """A piece as two other pieces, in every way."""
    for at in range(1, len(piece)):
        if piece[:at] in pieces and piece[at:] in pieces:
            yield piece[:at], piece[at:]
