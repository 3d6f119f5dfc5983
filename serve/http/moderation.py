"""The safety policy over a stream of outputs: the prompt before it reaches the model, the output before it is sent."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Literal

from calumma.model.document import Document, Image, Segment, Text
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.safety import Policy, PolicyInput

OutputStream = AsyncGenerator[OutputEvent, None]


async def moderated(
    job: GenerationRequest, generate: Callable[[GenerationRequest], OutputStream], policy: Policy | None
) -> OutputStream:
    """What `generate` answers to the job, under the policy. The prompt of token ids is shown as text when it starts."""
    if policy is None:
        async with aclosing(generate(job)) as pieces:
            async for piece in pieces:
                yield piece
        return
    asked = replace(job, previews=0)
    if isinstance(job.prompt, Document):
        if (why := await _ask_policy(policy, "prompt", job.prompt)) is not None:
            yield Started(TokenCount())
            yield ContentFiltered(why)
            return
    else:
        asked = replace(asked, echo=True)
    guard = _OutputFilter(policy)
    async with aclosing(generate(asked)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Started) and piece.echo is not None:
                why = await _ask_policy(policy, "prompt", Document((Text(piece.echo.text),)))
                if why is not None:
                    yield Started(piece.prompt)
                    yield ContentFiltered(why)
                    return
                piece = piece if job.echo else Started(piece.prompt)
            for checked in await guard.take(piece):
                yield checked
                if isinstance(checked, ContentFiltered):
                    return


class _OutputFilter:
    """Holds an answer's text back to the end of a word, and asks the policy about all that is to be sent."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sent: list[Segment] = []
        self._held = TextDelta("")
        self._count = TokenCount()

    async def take(self, piece: OutputEvent) -> list[OutputEvent]:
        match piece:
            case TextDelta():
                self._held = TextDelta(self._held.text + piece.text, self._held.tokens + piece.tokens)
                return await self._release(_end_of_words(self._held.text))
            case ImageOutput(png):
                before = await self._release(len(self._held.text))
                if before and isinstance(before[-1], ContentFiltered):
                    return before
                why = await self._ask(Image(png))
                return [*before, piece if why is None else ContentFiltered(why, self._count)]
            case Finished() | RequestFailed():
                self._count = piece.answer if isinstance(piece, Finished) else self._count
                before = await self._release(len(self._held.text), last=True)
                return before if before and isinstance(before[-1], ContentFiltered) else [*before, piece]
            case ImageProgress():
                return [replace(piece, preview=None)]
        return [piece]

    async def _release(self, characters: int, last: bool = False) -> list[OutputEvent]:
        """The first characters of what is held, with the tokens that go with them."""
        held = self._held
        if not characters and not (last and held.tokens):
            return []
        why = await self._ask(Text(held.text[:characters]))
        if why is not None:
            return [ContentFiltered(why, self._count)]
        whole = characters == len(held.text)
        now, later = (held.tokens, ()) if whole else ((), held.tokens)
        self._held = TextDelta(held.text[characters:], later)
        return [TextDelta(held.text[:characters], now)]

    async def _ask(self, segment: Segment) -> str | None:
        self._sent.append(segment)
        return await _ask_policy(self._policy, "answer", Document(tuple(self._sent)))


def _end_of_words(text: str) -> int:
    """Where the last whole word ends: behind the last white space."""
    return max((match.end() for match in re.finditer(r"\s", text)), default=0)


async def _ask_policy(policy: Policy, stage: Literal["prompt", "answer"], document: Document) -> str | None:
    """The policy may take its time, or look at pictures: it runs on a thread."""
    return await asyncio.to_thread(policy, PolicyInput(stage, document))
