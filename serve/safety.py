"""Safety hooks before and after generation.

A policy is a callable that is shown a prompt before it reaches the model, and the answer so far before any more of it
reaches the client; it returns None, or the reason that the client is told. `Safety.policy` of the settings names what
makes one, `package.module:callable`, called with `Safety.options`; `calumma.serve.safety:keywords` is an example.

Text of an answer is held back to the end of a word, so that a policy sees whole words; previews of unfinished images,
which no policy could judge, are not sent while there is one.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import unicodedata
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from calumma.model.document import Document, Image, Segment, Text
from calumma.serve.pieces import (
    Declined,
    Drawing,
    Finished,
    ImagePiece,
    Job,
    Piece,
    Refused,
    Started,
    TextPiece,
    TokenCount,
)
from calumma.serve.settings import Safety

Pieces = AsyncGenerator[Piece, None]


@dataclass(frozen=True)
class Look:
    """What a policy is shown: a prompt, or an answer as far as it has come and would be sent."""

    stage: Literal["prompt", "answer"]
    document: Document


Policy = Callable[[Look], str | None]


def keywords(words: Iterable[str], reason: str = "this request is against the rules of this server") -> Policy:
    """A policy that declines texts in which one of the words occurs as a whole word, whatever its case, its accents'
    encoding or the width of its letters (Unicode NFKC). An example: words alone tell little about intent."""
    alternatives = "|".join(re.escape(_plain(word)) for word in words if word.strip())
    if not alternatives:
        raise ValueError("keywords: give at least one word")
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")

    def policy(look: Look) -> str | None:
        return reason if pattern.search(_plain(look.document.text)) else None

    return policy


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def policy_of(safety: Safety) -> Policy | None:
    """The policy that the settings name. Raises ValueError."""
    if safety.policy is None:
        return None
    module, _, name = safety.policy.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"safety.policy: {safety.policy!r} is no package.module:callable: {error}") from error
    try:
        policy: Policy = make(**safety.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"safety.options do not fit {safety.policy}: {error}") from error
    if not callable(policy):
        raise ValueError(f"safety.policy: {safety.policy!r} made a {type(policy).__name__}, which cannot be called")
    return policy


async def guarded(job: Job, generate: Callable[[Job], Pieces], policy: Policy | None) -> Pieces:
    """What `generate` answers to the job, under the policy. The prompt of token ids is shown as text when it starts."""
    if policy is None:
        async with aclosing(generate(job)) as pieces:
            async for piece in pieces:
                yield piece
        return
    asked = replace(job, previews=0)
    if isinstance(job.prompt, Document):
        if (why := await _verdict(policy, "prompt", job.prompt)) is not None:
            yield Started(TokenCount())
            yield Declined(why)
            return
    else:
        asked = replace(asked, echo=True)
    guard = _Guard(policy)
    async with aclosing(generate(asked)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Started) and piece.echo is not None:
                why = await _verdict(policy, "prompt", Document((Text(piece.echo.text),)))
                if why is not None:
                    yield Started(piece.prompt)
                    yield Declined(why)
                    return
                piece = piece if job.echo else Started(piece.prompt)
            for checked in await guard.take(piece):
                yield checked
                if isinstance(checked, Declined):
                    return


class _Guard:
    """Holds an answer's text back to the end of a word, and asks the policy about all that is to be sent."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sent: list[Segment] = []
        self._held = TextPiece("")
        self._count = TokenCount()

    async def take(self, piece: Piece) -> list[Piece]:
        match piece:
            case TextPiece():
                self._held = TextPiece(self._held.text + piece.text, self._held.tokens + piece.tokens)
                return await self._release(_words(self._held.text))
            case ImagePiece(png):
                before = await self._release(len(self._held.text))
                if before and isinstance(before[-1], Declined):
                    return before
                why = await self._ask(Image(png))
                return [*before, piece if why is None else Declined(why, self._count)]
            case Finished() | Refused():
                self._count = piece.answer if isinstance(piece, Finished) else self._count
                before = await self._release(len(self._held.text), last=True)
                return before if before and isinstance(before[-1], Declined) else [*before, piece]
            case Drawing():
                return [replace(piece, preview=None)]
        return [piece]

    async def _release(self, characters: int, last: bool = False) -> list[Piece]:
        """The first characters of what is held, with the tokens that go with them."""
        held = self._held
        if not characters and not (last and held.tokens):
            return []
        why = await self._ask(Text(held.text[:characters]))
        if why is not None:
            return [Declined(why, self._count)]
        whole = characters == len(held.text)
        now, later = (held.tokens, ()) if whole else ((), held.tokens)
        self._held = TextPiece(held.text[characters:], later)
        return [TextPiece(held.text[:characters], now)]

    async def _ask(self, segment: Segment) -> str | None:
        self._sent.append(segment)
        return await _verdict(self._policy, "answer", Document(tuple(self._sent)))


def _words(text: str) -> int:
    """Where the last whole word ends: behind the last white space."""
    return max((match.end() for match in re.finditer(r"\s", text)), default=0)


async def _verdict(policy: Policy, stage: Literal["prompt", "answer"], document: Document) -> str | None:
    """The policy may take its time, or look at pictures: it runs on a thread."""
    return await asyncio.to_thread(policy, Look(stage, document))
