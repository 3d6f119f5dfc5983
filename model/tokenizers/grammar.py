"""Grammars over a text tokenizer's ids, for the engine's text phase: JSON, JSON schemas, regular expressions, choices,
context-free grammars, calls of tools.

By llguidance (https://github.com/guidance-ai/llguidance): an Earley parser over the bytes that ids stand for, a mask of
65,536 ids in some 0.2 ms, limits of its own on what a grammar may cost, and no dependencies; xgrammar brings triton,
apache-tvm-ffi and transformers.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from calumma.model.generation.constraint import Constraint, GrammarTooLarge
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.tool_calls import BEGIN_CALL, END_CALL, head_text
from calumma.model.vocabulary import Vocabulary

# Most characters of a grammar; GBNF's are read by Python, in time that grows with their square.
LONGEST = 1 << 17
LONGEST_GRAMMAR = 1 << 15
# What a grammar's expressions and a mask may cost (LLParserLimits): less than by default, because a mask is made within
# the engine's step. `(a{1000}){1000}` stops it for 0.2 s then, before it is given up; by default for 2.6 s.
EXPRESSIONS, STEP = 200_000, 50_000
# Compiled grammars that are kept, the last used.
KEPT = 64
# Whitespace between the parts of JSON: some, but no more than people write; else a model may go on with it for ever.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"
# What llguidance says where its limits are met, and where nothing fits.
TOO_LARGE, NO_TEXT = "lexer error: too many", "NoExtensionBias"
SPECIAL = b"\xff"  # begins the bytes of ids that are no text, to llguidance


class GrammarCompiler:
    """Gives grammars at the beginning of a text: a `ConstraintCompiler` of the engine. May be called from any thread.

    Where the tokenizer puts a space before texts, so do the grammars: the stream decoder takes it away.
    """

    def __init__(self, tokenizer: TextTokenizer, vocabulary: Vocabulary) -> None:
        self._text, self._vocabulary = tokenizer, vocabulary
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, TokenGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, constraint: Constraint) -> TokenGrammar:
        """Raises ValueError, which says what is wrong, on a grammar that is none, that asks for what is not supported,
        or that is too large."""
        with self._lock:
            if constraint in self._compiled:
                self._compiled.move_to_end(constraint)
                return self._compiled[constraint].copy()
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._text, self._vocabulary)
            tokenizer = self._tokenizer
        matcher = self._matcher(tokenizer, constraint, "")
        if self._text.leading_space and not _any_text(constraint):
            matcher = self._matcher(tokenizer, constraint, " ")
        compiled = TokenGrammar(matcher)
        if _any_text(constraint):
            compiled = TextOrCalls(matcher, self._text)
        with self._lock:
            self._compiled[constraint] = compiled
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return compiled.copy()

    def _matcher(self, tokenizer: llguidance.LLTokenizer, constraint: Constraint, before: str) -> llguidance.LLMatcher:
        limits = llguidance.LLParserLimits(verbose_errors=False, initial_lexer_fuel=EXPRESSIONS, step_lexer_fuel=STEP)
        matcher = llguidance.LLMatcher(tokenizer, grammar_of(constraint, before), log_level=0, limits=limits)
        first_W = np.zeros(-(-self._vocabulary.size // 32), dtype=np.int32)
        if not matcher.is_error():  # the first mask is what costs most, and tells what is wrong with many
            fill_next_token_bitmask(matcher, first_W[None])
        if matcher.is_error() or not first_W.any():
            reason = _first_line(matcher.get_error())
            if reason in ("", NO_TEXT):
                reason = "no text of this model's fits it"
            raise ValueError(f"{NAMES[constraint.kind]} cannot be followed: {reason}")
        return matcher


class TokenGrammar:
    """A `TokenConstraint`: a grammar at one place of a text."""

    may_begin_image = False

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        fill_next_token_bitmask(self._matcher, mask_W[None])
        self._check()

    def advance(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            self._require_affordable()
            raise ValueError(f"the grammar does not allow id {token} here: {_first_line(self._matcher.get_error())}")

    def copy(self) -> TokenGrammar:
        return TokenGrammar(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            self._require_affordable()
            raise ValueError(f"the grammar cannot be followed any further: {_first_line(self._matcher.get_error())}")

    def _require_affordable(self) -> None:
        reason = _first_line(self._matcher.get_error())
        if reason.startswith(TOO_LARGE):
            raise GrammarTooLarge(f"the grammar is too large to be followed ({reason}); ask for fewer repetitions")


class TextOrCalls(TokenGrammar):
    """Any text, images in it, and perhaps calls of tools at the end: then no more images."""

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: TextTokenizer, tail: bytes = b"") -> None:
        """tail: the last bytes of the text before calls, no more than matter; with the mark, once there are calls."""
        super().__init__(matcher)
        self._tokenizer, self._tail = tokenizer, tail

    @property
    def may_begin_image(self) -> bool:  # type: ignore[override]
        """Not within the mark that begins a call: an image would cut it in two."""
        return not any(self._tail.endswith(MARK[:n]) for n in range(1, len(MARK) + 1))

    def advance(self, token: int) -> None:
        super().advance(token)
        if not self._tail.endswith(MARK):
            before, mark, _ = (self._tail + self._tokenizer.surface(token)).partition(MARK)
            self._tail = mark or before[1 - len(MARK) :]

    def copy(self) -> TextOrCalls:
        return TextOrCalls(self._matcher.deep_copy(), self._tokenizer, self._tail)


NAMES = {
    "json": "JSON",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the choice",
    "grammar": "the grammar",
    "tools": "the tools",
}
MARK = BEGIN_CALL.encode()
ANY_TEXT = r"/(.|\n)*/"
# The JSON of calls as json.dumps writes it.
AS_WRITTEN: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def grammar_of(constraint: Constraint, before: str = "") -> str:
    """A constraint as llguidance takes it; `before` comes before its text. Raises ValueError."""
    longest = LONGEST_GRAMMAR if constraint.kind == "grammar" else LONGEST
    if len(constraint.value) > longest:
        raise ValueError(
            f"{NAMES[constraint.kind]} has {len(constraint.value)} characters; {longest} may be followed at most"
        )
    try:
        grammars = _grammars(constraint)
    except RecursionError as error:
        raise ValueError(f"{NAMES[constraint.kind]} is nested too deeply") from error
    if before:
        name = grammars[0].setdefault("name", "text")
        grammars.insert(0, {"name": "answer", "lark_grammar": f"start: {json.dumps(before)} @{name}"})
    return json.dumps({"grammars": grammars})


def _grammars(constraint: Constraint) -> list[dict[str, Any]]:
    """One of them, or more that refer to each other, the first one first."""
    kind, value = constraint.kind, constraint.value
    if kind == "json":
        return [_json_schema({"type": "object"})]
    if kind == "json_schema":
        schema = _parsed(value, "the JSON schema")
        if not isinstance(schema, dict | bool):
            raise ValueError(f"the JSON schema is {value[:40]!r}, and no object")
        return [_json_schema(schema)]
    if kind == "regex":
        if not value:
            raise ValueError("the regular expression is empty")
        return [_regex(value)]
    if kind == "choice":
        choices = _parsed(value, "the choice")
        if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
            raise ValueError(f"the choice is {value[:40]!r}, and no list of texts")
        # as one expression: its cost does not grow with how many there are
        return [_regex("|".join(map(_literal, choices)))]
    if kind == "tools":
        return _tools(value)
    if not value.strip():
        raise ValueError("the grammar is empty")
    try:
        return [{"lark_grammar": any_to_lark(value)}]
    except GbnfToLarkError as error:
        raise ValueError(f"the grammar is neither Lark's nor GBNF: {error}") from error


def _json_schema(schema: dict[str, Any] | bool) -> dict[str, Any]:
    made = llguidance.LLMatcher.grammar_from_json_schema(
        schema if isinstance(schema, dict) else {} if schema else {"enum": []},
        defaults={"whitespace_pattern": WHITESPACE},
    )
    return json.loads(made)["grammars"][0]


def _any_text(constraint: Constraint) -> bool:
    """Whether it lets a text be anything until a call begins."""
    if constraint.kind != "tools":
        return False
    asked = json.loads(constraint.value)
    return asked["calls"] == "may" and asked["text"] is None


def _tools(value: str) -> list[dict[str, Any]]:
    """Of `tool_calls.tools_value`."""
    asked = json.loads(value)
    grammars: list[dict[str, Any]] = []
    bodies = []
    for number, tool in enumerate(asked["tools"]):
        schema = llguidance.LLMatcher.grammar_from_json_schema(
            {"type": "object", **tool["parameters"]}, overrides={**AS_WRITTEN, "lenient": not tool["strict"]}
        )
        grammars.append({**json.loads(schema)["grammars"][0], "name": f"arguments{number}"})
        bodies.append(f"{json.dumps(head_text(tool['name']))} @arguments{number}")
    first, further = json.dumps(BEGIN_CALL), json.dumps(BEGIN_CALL)
    lines = [f"call: ({' | '.join(bodies)}) {json.dumps('}' + END_CALL)}"]
    if asked["calls"] == "must":
        start = ""
    elif asked["text"] is None:
        start, first = "TEXT | ", "until_call"
        lines.append(f"until_call[lazy]: {ANY_TEXT} {further}")
        lines.append(f"TEXT: {ANY_TEXT} & ~({ANY_TEXT} {further} {ANY_TEXT})")
    else:
        [text, *others] = _grammars(Constraint(*asked["text"]))
        grammars += [{**text, "name": text.setdefault("name", "text")}, *others]
        start = f"@{text['name']} | "
    more = f"({further} call)*" if asked["several"] else ""
    return [{"name": "calls", "lark_grammar": "\n".join([f"start: {start}{first} call {more}", *lines])}, *grammars]


def _regex(expression: str) -> dict[str, Any]:
    """Rust's (https://docs.rs/regex/latest/regex/#syntax), but for `\\d`, which is 0 to 9."""
    return {"lark_grammar": f"start: /{llguidance.regex_to_lark(expression, use_ascii='d')}/"}


def _parsed(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from error


def _literal(text: str) -> str:
    """A regular expression that a text alone matches."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _tokenizer(text: TextTokenizer, vocabulary: Vocabulary) -> llguidance.LLTokenizer:
    """What llguidance must know of a tokenizer: the bytes of every id, none for those that no text has, and how texts
    are usually cut."""
    ends = [vocabulary.eos, vocabulary.end_turn]
    tokens = [b""] * vocabulary.size
    for token in vocabulary.text_ids:
        surface = text.surface(token)
        tokens[token] = b"" if SPECIAL in surface else surface  # no byte of UTF-8
    for token in ends:
        tokens[token] = SPECIAL + f"<end{token}>".encode()
    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_Cut(text, tokens, ends)), n_vocab=vocabulary.size, eos_token=ends
    )


class _Cut:
    """What llguidance's TokenizerWrapper asks for."""

    bos_token_id = None

    def __init__(self, text: TextTokenizer, tokens: list[bytes], ends: list[int]) -> None:
        self._text, self.tokens = text, tokens
        self.eos_token_id, self.special_token_ids = ends[0], ends

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts are cut as str")
        return self._text.encode_further(text)


def _first_line(message: str) -> str:
    return message.partition("\n")[0]
