"""The id space of a text model that becomes mixed-modal: its own ids stay, those of images follow.

Which of its special ids begin and end what is read from its folder as transformers reads it: tokenizer_config.json,
generation_config.json, config.json, and the chat template, which also says what ends an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from calumma.model.convert import text
from calumma.model.convert.names import ConversionError
from calumma.model.tokenizers.chat import ChatTemplate
from calumma.model.tokenizers.text import HuggingFaceTokenizer
from calumma.model.vocabulary import ChatFormat, Vocabulary

TEMPLATE_FILE = "chat_template.jinja"
VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class TextVocabulary(NamedTuple):
    """`vocabulary` has `own` ids of the text model; `tokenizer` is its tokenizer.json."""

    vocabulary: Vocabulary
    tokenizer: HuggingFaceTokenizer
    own: int


def extended_vocabulary(
    source: Path, settings: Mapping[str, Any], own: int, codes: int, with_template: bool = True
) -> TextVocabulary:
    """The vocabulary and tokenizer of a text model's folder, with as many image codes; `settings`: its config.json;
    `own`: rows of its embedding. Raises ConversionError."""
    document = tokenizer_json(source)
    where = str(source / "tokenizer.json")
    if not isinstance((document.get("model") or {}).get("vocab"), dict):
        raise ConversionError(f"{where} has no vocabulary by name (model.vocab); only BPE tokenizers can be read")
    names = text.names(document)
    if max(names.values()) >= own:
        raise ConversionError(
            f"{where} has id {max(names.values())}, the model only {own} ids: its embedding was not resized when the "
            "tokenizer got more; do that first (transformers: resize_token_embeddings)"
        )
    given = _tokenizer_config(source)
    tokens = {name: token for name in VARIABLES if (token := _name(given.get(name))) in names}
    special = {token["id"] for token in document.get("added_tokens") or [] if token.get("special")}
    special |= {names[token] for token in tokens.values()}
    template = _chat_template(source, given) if with_template else None
    chat = None if template is None else ChatFormat(template=template, variables=tokens)
    ends = _end_ids(source, settings, names.get(tokens.get("eos_token", "")), own)
    closing = _closing(chat, {name: token for name, token in names.items() if token in special}, where)
    eos, end_turn = ends[0] if ends else None, None
    if closing is not None:
        pad = names.get(tokens.get("pad_token", ""))
        others = [token for token in (*ends, pad) if token not in (None, closing)]
        eos, end_turn = (others[0], closing) if others else (closing, None)
    ids = {
        "eos": eos,
        "end_turn": end_turn,
        "unknown": names.get(tokens.get("unk_token", "")),
        "bos": names.get(tokens.get("bos_token", "")),
        "pad": names.get(tokens.get("pad_token", "")),
    }
    return _numbered(ids, document, names, special, chat, own, codes, where)


def _numbered(
    ids: Mapping[str, int | None],
    document: dict[str, Any],
    names: Mapping[str, int],
    special: set[int],
    chat: ChatFormat | None,
    own: int,
    codes: int,
    where: str,
) -> TextVocabulary:
    """Ids of its own for what the model lacks, after the text model's: begin and end of images first."""
    known: dict[str, int] = {}
    further = own
    for name in ("begin_image", "end_image", "eos", "end_turn", "unknown", "bos", "pad"):
        token = ids.get(name)
        if name == "bos" and token is None:
            token = known["eos"]  # documents begin with what they end with, as in GPT-2 and Qwen
        elif token is None or (token in known.values() and (name, token) != ("bos", known.get("eos"))):
            token, further = further, further + 1
        known[name] = token
    size = further + codes
    taken = {*known.values()}
    reserved = (special | (set(range(own)) - set(names.values()))) - taken
    vocabulary = Vocabulary(
        size=size, **known, image_codes=[*range(further, size)], reserved=sorted(reserved), chat=chat
    )
    try:
        tokenizer = HuggingFaceTokenizer(json.dumps(document, ensure_ascii=False), vocabulary)
        ChatTemplate.of(chat, tokenizer)
    except ValueError as error:
        raise ConversionError(f"{where}: {error}") from error
    return TextVocabulary(vocabulary, tokenizer, own)


def tokenizer_json(source: Path) -> dict[str, Any]:
    """The folder's tokenizer.json, or what its sentencepiece model says in that form. Raises ConversionError."""
    if (source / "tokenizer.json").is_file() or not (source / "tokenizer.model").is_file():
        return text.read_json(source / "tokenizer.json")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{source / 'tokenizer.model'} is not a sentencepiece model: {error}") from error
    return of_sentencepiece(processor)


def of_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Llama's tokenizer.model as transformers' own conversion makes its tokenizer.json: a space before every text,
    unknown characters in bytes. Raises ConversionError."""
    pieces = {processor.id_to_piece(token): token for token in range(processor.get_piece_size())}
    if "<0x00>" not in pieces:
        raise ConversionError("the sentencepiece model does not fall back to bytes; only such BPE models can be read")
    controls = [token for token in pieces.values() if processor.is_control(token) or processor.is_unknown(token)]
    plain = [t for t in pieces.values() if t not in controls and not processor.is_byte(t)]
    text_pieces = {processor.id_to_piece(token): token for token in plain}
    rank = {token: -processor.get_score(token) for token in plain}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": token, "content": processor.id_to_piece(token), **flags, "special": True} for token in controls]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if processor.encode("a", out_type=str)[0].startswith("▁"):
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    normalizer = {"type": "Sequence", "normalizers": steps}
    return text.bpe_document(processor, pieces, text_pieces, rank, normalizer, added, fuse_unk=True)


def _tokenizer_config(source: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).is_file():
            found |= {key: value for key, value in text.read_json(source / name).items() if value is not None}
    if not found and (source / "tokenizer.model").is_file():
        found = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return found


def _name(token: Any) -> str | None:
    """Of a special token, which stands there as a text or as an object."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _chat_template(source: Path, given: Mapping[str, Any]) -> str | None:
    if (source / TEMPLATE_FILE).is_file():
        return (source / TEMPLATE_FILE).read_text(encoding="utf-8")
    if (source / "chat_template.json").is_file():
        given = text.read_json(source / "chat_template.json")
    template = given.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) and template.strip() else None


def _end_ids(source: Path, settings: Mapping[str, Any], first: int | None, own: int) -> list[int]:
    """What the folder's files call the end of a text, the tokenizer's first."""
    generation = source / "generation_config.json"
    said = [first]
    for values in (text.read_json(generation) if generation.is_file() else {}, settings):
        ends = values.get("eos_token_id")
        said += ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(token for token in said if isinstance(token, int) and 0 <= token < own))


def _closing(chat: ChatFormat | None, names: dict[str, int], where: str) -> int | None:
    if chat is None:
        return None
    try:
        return ChatTemplate(chat, names).closing()
    except ValueError as error:
        raise ConversionError(f"{where}: {error}; leave it out with --no-chat-template") from error
