"""The safety policy over a stream of outputs: the prompt before it reaches the model, the output before it is sent.

Text of an output is held back to the end of a word, so that a policy sees whole words; previews of unfinished images,
which no policy could judge, are not sent while there is one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
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
    OutputStream,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.safety import Policy, PolicyInput


async def moderated(
    request: GenerationRequest, generate: Callable[[GenerationRequest], OutputStream], policy: Policy | None
) -> OutputStream:
    """What `generate` makes of the request, under the policy. A prompt of token ids is shown to it as text, which is
    known when the request has started."""
    if policy is None:
        async with aclosing(generate(request)) as events:
            async for event in events:
                yield event
        return
    passed = replace(request, previews=0)
    if isinstance(request.prompt, Document):
        if (reason := await _ask_policy(policy, "prompt", request.prompt)) is not None:
            yield Started(TokenCount())
            yield ContentFiltered(reason)
            return
    else:
        passed = replace(passed, echo=True)
    output_filter = _OutputFilter(policy)
    async with aclosing(generate(passed)) as events:
        async for event in events:
            if isinstance(event, Started) and event.echo is not None:
                reason = await _ask_policy(policy, "prompt", Document((Text(event.echo.text),)))
                if reason is not None:
                    yield Started(event.prompt)
                    yield ContentFiltered(reason)
                    return
                event = event if request.echo else Started(event.prompt)
            for checked in await output_filter.push(event):
                yield checked
                if isinstance(checked, ContentFiltered):
                    return


class _OutputFilter:
    """Holds an output's text back to the end of a word, and asks the policy about all that is to be sent."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sent: list[Segment] = []
        self._pending = TextDelta("")
        self._completion = TokenCount()

    async def push(self, event: OutputEvent) -> list[OutputEvent]:
        """What may be sent once the event is there; after ContentFiltered nothing more."""
        match event:
            case TextDelta():
                self._pending = TextDelta(self._pending.text + event.text, self._pending.tokens + event.tokens)
                return await self._release(_end_of_words(self._pending.text))
            case ImageOutput(png):
                before = await self._release(len(self._pending.text))
                if before and isinstance(before[-1], ContentFiltered):
                    return before
                reason = await self._ask(Image(png))
                return [*before, event if reason is None else ContentFiltered(reason, self._completion)]
            case Finished() | RequestFailed():
                self._completion = event.completion if isinstance(event, Finished) else self._completion
                before = await self._release(len(self._pending.text), last=True)
                return before if before and isinstance(before[-1], ContentFiltered) else [*before, event]
            case ImageProgress():
                return [replace(event, preview=None)]
        return [event]

    async def _release(self, characters: int, last: bool = False) -> list[OutputEvent]:
        """The first characters of what is pending, with the tokens that go with them."""
        pending = self._pending
        if not characters and not (last and pending.tokens):
            return []
        reason = await self._ask(Text(pending.text[:characters]))
        if reason is not None:
            return [ContentFiltered(reason, self._completion)]
        whole = characters == len(pending.text)
        now, later = (pending.tokens, ()) if whole else ((), pending.tokens)
        self._pending = TextDelta(pending.text[characters:], later)
        return [TextDelta(pending.text[:characters], now)]

    async def _ask(self, segment: Segment) -> str | None:
        self._sent.append(segment)
        return await _ask_policy(self._policy, "answer", Document(tuple(self._sent)))


def _end_of_words(text: str) -> int:
    """Where the last whole word ends: behind the last white space."""
    return max((match.end() for match in re.finditer(r"\s", text)), default=0)


async def _ask_policy(policy: Policy, stage: Literal["prompt", "answer"], document: Document) -> str | None:
    """The policy may take its time, or look at images: it runs on a thread."""
    return await asyncio.to_thread(policy, PolicyInput(stage, document))
