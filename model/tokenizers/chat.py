"""Conversations in a text model's own format: its Jinja chat template, as transformers renders it
(https://huggingface.co/docs/transformers/chat_templating), with images in the turns.

The template is rendered around marks that stand for what the turns say, which comes in afterwards, as text: what a user
types is never read as a special name. From one special name to the next a text is cut into tokens as a whole, as
transformers cuts it; but for answers, which begin where the model is asked for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2.nodes import Node
from jinja2.parser import Parser

from calumma.model.document import Document, Role, Text, Turn
from calumma.model.tokenizers.text import HuggingFaceTokenizer, TextTokenizer
from calumma.model.vocabulary import ChatFormat

MARK = "\ue000{}\ue001"  # of characters for private use, which no template writes
MARKS = re.compile("\ue000(\\d+)\ue001")
SPECIAL = "\ue002{}\ue001"  # a special id, in a conversation as text


@dataclass(frozen=True)
class Run:
    """Text that is cut into tokens as a whole. begins: it stands at the beginning, or behind a special id."""

    text: str
    trained: bool
    begins: bool


@dataclass(frozen=True)
class Special:
    token: int
    trained: bool


@dataclass(frozen=True)
class Picture:
    """The next of the document's images."""

    trained: bool


Piece = Run | Special | Picture


class ChatTemplate:
    """Raises ValueError on a template that is none, or that a question cannot be written with."""

    def __init__(self, chat: ChatFormat, names: dict[str, int]) -> None:
        """names: of the special ids, as the template writes them."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse  # no strftime_now: tokens would depend on the day
        self._variables, self._names = chat.variables, names
        by_length = sorted(names, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        try:
            self._template = environment.from_string(chat.template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error
        self._asks = self._render([("user", MARK.format(0))], ask=True).partition(MARK.format(0))[2]
        self._literals: list[str] | None = None

    @classmethod
    def of(cls, chat: ChatFormat | None, tokenizer: TextTokenizer) -> ChatTemplate | None:
        """None where conversations have calumma's own format."""
        if chat is None:
            return None
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError("a chat template needs a text_tokenizer.json, with the special names that it writes")
        return cls(chat, tokenizer.special_names)

    def closing(self) -> int | None:
        """The special id that ends an answer, if one does."""
        pieces = self.pieces(Document((Text("?", "user"), Text("!", "assistant"))), complete=True)
        return next((piece.token for piece in pieces if isinstance(piece, Special) and piece.trained), None)

    def spoken(self, written: str) -> list[tuple[Role, str]] | None:
        """The inverse of `pieces`: what each turn says of a conversation in which special ids stand as SPECIAL; None
        where it is none that the template has written."""
        if self._literals is None:
            probe = [("user", MARK.format(0)), ("assistant", MARK.format(1)), ("user", MARK.format(2))]
            between = [self._with_ids(text) for text in MARKS.split(self._render(probe, ask=False))[::2]]
            last = MARKS.split(self._render(probe[:2], ask=False))[-1]
            self._literals = [*between, self._with_ids(last), self._with_ids(self._asks)]
        begins, answered, asked, unanswered, last, asks = self._literals
        if not written.startswith(begins):
            return None
        turns: list[tuple[Role, str]] = []
        rest = written.removeprefix(begins)
        while True:
            said, mark, rest = _parted(rest, (answered, asks, unanswered))
            turns.append(("user", said))
            if not mark or not rest:
                return turns
            said, mark, rest = _parted(rest, (asked, last))
            turns.append(("assistant", said))
            if mark != asked or not rest:
                return turns

    def _with_ids(self, literal: str) -> str:
        return self._specials.sub(lambda found: SPECIAL.format(self._names[found[0]]), literal)

    def pieces(self, document: Document, complete: bool) -> list[Piece]:
        """What a conversation is written as; not `complete`: up to where the model answers. Answers are trained, and
        what ends them. Raises ValueError where the template refuses the conversation, or leaves out a turn."""
        turns = [Turn(turn.role or "user", turn.segments) for turn in document.turns()]
        messages = [(turn.role or "user", _marked(turn, number)) for number, turn in enumerate(turns)]
        parts = MARKS.split(self._render(messages, ask=not complete))
        literals, numbers = parts[::2], [int(number) for number in parts[1::2]]
        if numbers != [*range(len(turns))]:
            raise ValueError("the model's chat template does not write every turn of this conversation once, in order")
        writer = _Writer(self._specials, self._names)
        before: Turn | None = None
        for literal, turn in zip(literals, [*turns, None], strict=True):
            if before is not None and before.role == "assistant" and (found := self._specials.search(literal)):
                writer.write(literal[: found.end()], before.segments[-1].trained)
                literal = literal[found.end() :]
            answers = turn is not None and turn.role == "assistant"
            asked = len(self._asks) if answers and literal.startswith(self._asks) else len(literal)
            writer.write(literal[:asked], False)
            # what the template puts before an answer, but not when it asks for one
            writer.write(literal[asked:], turn is not None and turn.segments[0].trained)
            for text, trained in _contents(turn) if turn is not None else ():
                if text is None:
                    writer.picture(trained and answers)
                else:
                    writer.text(text, trained and answers)
            before = turn
        return writer.finish()

    def _render(self, messages: Sequence[tuple[str, str]], ask: bool) -> str:
        given = {
            "messages": [{"role": role, "content": content} for role, content in messages],
            "add_generation_prompt": ask,
            "enable_thinking": False,  # an answer begins alike in training and when the model is asked
            "tools": None,
            "documents": None,
        }
        try:
            return self._template.render(**(self._variables | given))
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"the model's chat template fails on this conversation: {error!r}") from error


def _parted(text: str, marks: tuple[str, ...]) -> tuple[str, str, str]:
    """A text at the first of some marks; at the end of the text where there is none."""
    places = [(text.find(mark), -len(mark), mark) for mark in marks if mark and mark in text]
    if not places:
        return text, "", ""
    at, _, mark = min(places)
    return text[:at], mark, text[at + len(mark) :]


def _marked(turn: Turn, number: int) -> str:
    """The mark, within the white space around what the turn says: templates may strip that."""
    return f"{_space(turn)[0]}{MARK.format(number)}{_space(turn)[1]}"


def _space(turn: Turn) -> tuple[str, str]:
    first, last = turn.segments[0], turn.segments[-1]
    before = first.text[: len(first.text) - len(first.text.lstrip())] if isinstance(first, Text) else ""
    if first is last and isinstance(first, Text) and not first.text.strip():
        return before, ""
    after = last.text[len(last.text.rstrip()) :] if isinstance(last, Text) else ""
    return before, after


def _contents(turn: Turn) -> list[tuple[str | None, bool]]:
    """What the turn says without the white space around it: texts, None for an image; and whether it is trained."""
    contents: list[tuple[str | None, bool]] = []
    for segment in turn.segments:
        text = segment.text if isinstance(segment, Text) else None
        if text is not None and segment is turn.segments[0]:
            text = text.lstrip()
        if text is not None and segment is turn.segments[-1]:
            text = text.rstrip()
        contents.append((text, segment.trained))
    return contents


class _Writer:
    """Puts pieces together; adjacent texts are one run where they are alike in being trained."""

    def __init__(self, specials: re.Pattern[str], names: dict[str, int]) -> None:
        self._specials, self._names = specials, names
        self._pieces: list[Piece] = []
        self._run, self._trained, self._begins = "", False, True

    def write(self, literal: str, trained: bool) -> None:
        """Of the template: special names in it are ids."""
        at = 0
        for found in self._specials.finditer(literal):
            self.text(literal[at : found.start()], trained)
            self.finish()
            self._pieces.append(Special(self._names[found[0]], trained))
            self._begins, at = True, found.end()
        self.text(literal[at:], trained)

    def text(self, text: str, trained: bool) -> None:
        if not text:
            return
        if trained != self._trained:
            self.finish()
        self._run, self._trained = self._run + text, trained

    def picture(self, trained: bool) -> None:
        self.finish()
        self._pieces.append(Picture(trained))
        self._begins = False

    def finish(self) -> list[Piece]:
        if self._run:
            self._pieces.append(Run(self._run, self._trained, self._begins))
            self._run, self._begins = "", False
        return self._pieces


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` tells transformers what is an answer: only what stands in it counts here."""

    tags = {"generation"}  # noqa: RUF012 (as its class declares it)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **given: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **given)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
