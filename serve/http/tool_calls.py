"""Calls of tools in an answer: from its text, in which they stand between marks (`tokenizers/tool_calls.py`), to events
of their own.

The grammar that the answer follows lets only whole calls come, unless the answer is cut.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from calumma.model.tokenizers.tool_calls import BEGIN_CALL, HEAD
from calumma.serve.protocol import OutputEvent, OutputStream, TextDelta


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call. index: its number among those of the answer. id and name: with the first of it alone. arguments:
    a further piece of them."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


AnswerEvent = OutputEvent | ToolCallDelta
AnswerStream = AsyncGenerator[AnswerEvent, None]


async def with_tool_calls(stream: OutputStream) -> AnswerStream:
    """The same events, but for text that is a call."""
    finder = ToolCallFinder()
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, TextDelta):
                text, calls = finder.push(event.text)
                if text or event.tokens:
                    yield TextDelta(text, event.tokens)
                for call in calls:
                    yield call
                continue
            if held := finder.interrupt():
                yield TextDelta(held)
            yield event


class ToolCallFinder:
    """Text in pieces in, however they are cut; text and calls out."""

    def __init__(self) -> None:
        self._pending = ""  # what is not given out yet
        self._calls = 0
        self._within = False  # a call has begun
        self._arguments: _ObjectEnd | None = None  # of the call under way, once its name is known

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """The text that is certainly none of a call, and what there is of calls."""
        self._pending += text
        said = ""
        calls: list[ToolCallDelta] = []
        while True:
            if not self._within:
                before, mark, rest = self._pending.partition(BEGIN_CALL)
                if not mark:
                    held = _mark_begun(before)
                    said += "" if self._calls else before[: len(before) - held]  # between calls there is no text
                    self._pending = before[len(before) - held :]
                    return said, calls
                said += "" if self._calls else before
                self._pending, self._within = rest, True
            if self._arguments is None:
                head = HEAD.match(self._pending)
                if head is None:
                    return said, calls
                self._pending, self._arguments = self._pending[head.end() :], _ObjectEnd()
                calls.append(ToolCallDelta(self._calls, "", f"call_{uuid.uuid4().hex}", head["name"]))
            length = self._arguments.push(self._pending)
            if length:
                calls.append(ToolCallDelta(self._calls, self._pending[:length]))
            self._pending = self._pending[length:]
            if not self._arguments.ended:
                return said, calls
            self._calls += 1
            self._within, self._arguments = False, None

    def interrupt(self) -> str:
        """What was held back, when the text ends or an image comes."""
        held, self._pending = ("", self._pending) if self._within or self._calls else (self._pending, "")
        return held


class _ObjectEnd:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.ended = False

    def push(self, text: str) -> int:
        """How many of the characters belong to it."""
        for number, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.ended = True
                    return number + 1
        return len(text)


def _mark_begun(text: str) -> int:
    """Length of the longest end of a text that the mark begins with."""
    return next((n for n in range(len(BEGIN_CALL) - 1, 0, -1) if text.endswith(BEGIN_CALL[:n])), 0)
