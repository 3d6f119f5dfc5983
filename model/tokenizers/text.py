"""Text tokenizers: sentencepiece BPE, whose vocabulary also holds the special and image tokens (paper section 2.2), and
Hugging Face's tokenizer.json for imported models.

Nothing that a user types can become a special or image id: those are control symbols of the sentencepiece model, and
are taken out of what a tokenizer.json encodes with. Any Unicode text survives encode and decode: unknown characters
fall back to UTF-8 bytes (in a tokenizer.json as far as it is byte-level or falls back to bytes itself).
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from calumma.model.vocabulary import Vocabulary

FILE = "text_tokenizer.model"
HUGGING_FACE_FILE = "text_tokenizer.json"
SPACE = "▁"  # sentencepiece's stand-in for a space; a real one in the text goes through its bytes
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a piece that stands for a byte


def file_of(directory: str | Path) -> Path:
    """The text tokenizer's file in a directory. Raises FileNotFoundError."""
    for name in (FILE, HUGGING_FACE_FILE):
        if (path := Path(directory) / name).is_file():
            return path
    raise FileNotFoundError(f"{directory} has no text tokenizer: neither {FILE} nor {HUGGING_FACE_FILE}")


class TextTokenizer(ABC):
    """Text to token ids and back, of either kind; `read` gives the one that a directory holds."""

    leading_space = False  # encode puts a space before the text, which decode takes away

    @staticmethod
    def read(directory: str | Path) -> TextTokenizer:
        """Reads `text_tokenizer.model`, or `text_tokenizer.json` and `vocabulary.json`. Raises FileNotFoundError."""
        path = file_of(directory)
        if path.name == FILE:
            return SentencepieceTokenizer(path.read_bytes())
        return HuggingFaceTokenizer(path.read_text(encoding="utf-8"), Vocabulary.read(directory))

    @property
    @abstractmethod
    def size(self) -> int:
        """Ids in all, special and image ids too."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's file; its `vocabulary.json` is written with the vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone: no bos, never a special or image id."""

    def encode_further(self, text: str) -> list[int]:
        """Token ids of a text that goes on another: without the space that is put before a text that begins."""
        return self.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` of every text."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    @abstractmethod
    def surface(self, token: int) -> bytes:
        """The UTF-8 bytes a token stands for; empty for special and image ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse of `encode`; special and image ids vanish, broken UTF-8 becomes U+FFFD."""
        stream = self.stream_decoder()
        return "".join([*(stream.push(i) for i in ids), stream.finish()])

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)


class StreamDecoder:
    """Text of a token stream as it comes, held back while a UTF-8 character is incomplete."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.leading_space

    def push(self, token: int) -> str:
        surface = self._tokenizer.surface(token)
        if self._at_start and surface:
            self._at_start = False
            surface = surface.removeprefix(b" ")
        return self._decoder.decode(surface)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def require_unicode(text: str) -> None:
    """Raises ValueError for lone surrogates, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error


class SentencepieceTokenizer(TextTokenizer):
    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        processor = self._processor
        self._bytes = {
            processor.piece_to_id(f"<0x{value:02X}>"): value
            for value in range(256)
            if processor.is_byte(processor.piece_to_id(f"<0x{value:02X}>"))
        }
        self._byte_id = {value: token for token, value in self._bytes.items()}

    def save(self, directory: str | Path) -> None:
        (Path(directory) / FILE).write_bytes(self._model)

    @property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        return self._processor

    @property
    def size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE)):
            if index:
                ids += [self._byte_id[value] for value in SPACE.encode()]
            ids += self._plain(part)
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        # Arrays straight from the library: a list of Python's integers between costs a tenth of the whole.
        alone = [_sentencepiece_takes(text) for text in texts]
        whole = [text for text, is_alone in zip(texts, alone, strict=True) if is_alone]
        encoded = iter(self._processor.encode(whole, return_type="numpy", num_threads=1))
        return [
            next(encoded) if is_alone else np.array(self.encode(text), dtype=np.int32)
            for text, is_alone in zip(texts, alone, strict=True)
        ]

    def _plain(self, text: str) -> list[int]:
        """sentencepiece strips NUL: it goes through its byte."""
        if "\0" not in text:
            return self._processor.encode(text) if text else []
        ids: list[int] = []
        for index, part in enumerate(text.split("\0")):
            ids += ([self._byte_id[0]] if index else []) + (self._processor.encode(part) if part else [])
        return ids

    def surface(self, token: int) -> bytes:
        if token in self._bytes:
            return bytes([self._bytes[token]])
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return self._processor.id_to_piece(token).replace(SPACE, " ").encode()


def _sentencepiece_takes(text: str) -> bool:
    """Whether sentencepiece alone encodes a text as SentencepieceTokenizer does. Raises as `require_unicode`."""
    require_unicode(text)
    return bool(text) and SPACE not in text and "\0" not in text


class HuggingFaceTokenizer(TextTokenizer):
    """A BPE tokenizer.json, encoding as its own library does but for two things.

    What the vocabulary calls special or image is taken out, added tokens and merges that lead there as well, so that no
    text becomes one. And where the tokenizer puts a space before a text, it always does, also before one that begins
    with a space, so that decoding knows to take it away. Characters that a tokenizer without bytes lacks are left out.
    """

    def __init__(self, content: str, vocabulary: Vocabulary) -> None:
        """`content` is the file's text. Raises ValueError when it is no BPE tokenizer of the kinds that can be read."""
        self._content = content
        self._vocabulary = vocabulary
        document = json.loads(content)
        model = document.get("model") or {}
        if model.get("type") != "BPE":
            raise ValueError(f"the tokenizer's model is {model.get('type')!r}; only BPE can be read")
        for field in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(field):
                raise ValueError(f"the tokenizer marks parts of words ({field} {model[field]!r}), which cannot be read")
        names = {token: name for name, token in model["vocab"].items()}
        names |= {added["id"]: added["content"] for added in document.get("added_tokens") or []}
        not_text = {*vocabulary.special_ids, *vocabulary.image_ids}
        self._pieces = {token: name for token, name in names.items() if token not in not_text}
        self._special_names = {name: token for token, name in names.items() if token in vocabulary.special_ids}
        if self._pieces and max(self._pieces) >= vocabulary.size:
            raise ValueError(f"the tokenizer has id {max(self._pieces)}, the vocabulary {vocabulary.size} ids")
        self._tokenizer, self.leading_space, self._spaces_all = _text_only(document, not_text)
        self._alphabet = _byte_alphabet() if _has(document, "ByteLevel") else None
        self._spaced = self._alphabet is None and SPACE in json.dumps(
            [document.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False
        )
        self._byte_id: dict[int, int] = {}
        if model.get("byte_fallback"):
            self._byte_id = {
                int(m[1], 16): token for token, name in self._pieces.items() if (m := BYTE.fullmatch(name))
            }
        self._bytes = {token: value for value, token in self._byte_id.items()}
        self._marker = [self._byte_id[value] for value in SPACE.encode()] if len(self._byte_id) == 256 else None

    def save(self, directory: str | Path) -> None:
        (Path(directory) / HUGGING_FACE_FILE).write_text(self._content, encoding="utf-8")

    @property
    def content(self) -> str:
        """The tokenizer.json."""
        return self._content

    @property
    def special_names(self) -> dict[str, int]:
        """Of the special ids that have one. No text becomes one: they are for templates."""
        return self._special_names

    @property
    def size(self) -> int:
        return self._vocabulary.size

    def encode(self, text: str) -> list[int]:
        return self.encode_further(" " + text if text and self.leading_space else text)

    def encode_run(self, text: str) -> list[int]:
        """A text behind a special id, as the tokenizer's own library cuts it there: some put a space before every such
        text, some before the first of all alone."""
        return self.encode(text) if self._spaces_all else self.encode_further(text)

    def encode_further(self, text: str) -> list[int]:
        require_unicode(text)
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE) if self._spaced and self._marker else [text]):
            if index:
                ids += self._marker or []
            if part:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def surface(self, token: int) -> bytes:
        if token in self._bytes:
            return bytes([self._bytes[token]])
        piece = self._pieces.get(token, "")
        if self._alphabet is not None:
            return b"".join(self._alphabet.get(character) or character.encode() for character in piece)
        return (piece.replace(SPACE, " ") if self._spaced else piece).encode()


def _text_only(document: dict[str, Any], not_text: set[int]) -> tuple[tokenizers.Tokenizer, bool, bool]:
    """The tokenizer of a tokenizer.json without the ids in `not_text`; whether it put a space before texts, and
    whether before those behind special ids too."""
    model = document["model"]
    vocabulary = {name: token for name, token in model["vocab"].items() if token not in not_text}
    merges = []
    for merge in model.get("merges") or []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append([left, right])
    unknown = model.get("unk_token") if model.get("unk_token") in vocabulary else None
    added = [token for token in document.get("added_tokens") or [] if token["id"] not in not_text]
    vocabulary |= {token["content"]: token["id"] for token in added}  # else the library would number them anew
    text_model = {**model, "vocab": vocabulary, "merges": merges, "unk_token": unknown, "dropout": None}
    cut = dict.fromkeys(("truncation", "padding", "post_processor")) | {"added_tokens": added, "model": text_model}
    normalizer, before = _without_space(document.get("normalizer"))
    pre_tokenizer, between = _without_space(document.get("pre_tokenizer"))
    bare = json.dumps({**document, **cut, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer})
    spaces = {before, between} - {"never"}
    try:
        return tokenizers.Tokenizer.from_str(bare), bool(spaces), "always" in spaces
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"not a tokenizer.json that can be read: {error}") from error


def _without_space(part: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """A normalizer or pre-tokenizer that puts no space before texts; and before which it did: `always`, `first`, that
    is before the first of all, or `never`."""
    if part is None:
        return None, "never"
    if part["type"] == "Prepend":
        return None, "always"
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}, "always" if part.get("add_prefix_space", True) else "never"
    if part["type"] == "Metaspace":
        scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**kept, "prepend_scheme": "never"}, scheme
    if part["type"] == "Sequence":
        field = "normalizers" if "normalizers" in part else "pretokenizers"
        changed = [_without_space(inner) for inner in part[field]]
        schemes = [scheme for _, scheme in changed if scheme != "never"]
        return {**part, field: [inner for inner, _ in changed if inner]}, schemes[0] if schemes else "never"
    return part, "never"


def _has(document: dict[str, Any], kind: str) -> bool:
    """Whether a tokenizer.json pre-tokenizes or decodes by `kind`."""
    parts = json.dumps([document.get("pre_tokenizer"), document.get("decoder")])
    return f'"type": "{kind}"' in parts


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable characters for bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): bytes([value]) for value in printable} | {
        chr(256 + k): bytes([value]) for k, value in enumerate(others)
    }
