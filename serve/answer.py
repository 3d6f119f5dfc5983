"""Pieces of answers to OpenAI's responses: whole, or chunk by chunk as server-sent events."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from calumma.serve import wire
from calumma.serve.metrics import Metrics
from calumma.serve.pieces import Drawing, Finished, ImagePiece, Piece, Refused, Started, TextPiece, TokenCount
from calumma.serve.wire import WireError

Pieces = AsyncGenerator[Piece, None]


@dataclass(frozen=True)
class Label:
    """What every response and chunk of a request carries."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass
class Answer:
    """A whole answer: texts and PNG files in their order."""

    parts: list[str | bytes] = field(default_factory=list)
    prompt: TokenCount = field(default_factory=TokenCount)
    answer: TokenCount = field(default_factory=TokenCount)
    reason: Literal["stop", "length"] = "stop"

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    def add(self, piece: Piece) -> None:
        match piece:
            case Started(prompt):
                self.prompt = prompt
            case TextPiece(text):
                if self.parts and isinstance(self.parts[-1], str):
                    self.parts[-1] += text
                else:
                    self.parts.append(text)
            case ImagePiece(png):
                self.parts.append(png)
            case Finished(reason, answer):
                self.reason, self.answer = reason, answer
            case Refused():
                refuse(piece)


def refuse(piece: Refused) -> NoReturn:
    raise WireError(piece.message, status=piece.status, param=piece.param, code=piece.code)


async def watched(pieces: Pieces, metrics: Metrics) -> Pieces:
    """The same pieces, counted as they pass."""
    begin, first = time.monotonic(), True
    with metrics.answering():
        async with aclosing(pieces):
            async for piece in pieces:
                if first and isinstance(piece, TextPiece | ImagePiece):
                    metrics.first_piece(begin)
                    first = False
                match piece:
                    case Started(prompt):
                        metrics.prompt(prompt)
                    case ImagePiece():
                        metrics.image()
                    case Finished(_, answer):
                        metrics.answer(answer)
                yield piece


async def collected(pieces: Pieces) -> Answer:
    """Wait for the whole answer. Raises WireError when the job was refused or failed."""
    answer = Answer()
    async with aclosing(pieces):
        async for piece in pieces:
            answer.add(piece)
    return answer


async def accepted(pieces: Pieces) -> Started:
    """Wait until the job is taken in, so that a refusal still becomes an HTTP status. Raises WireError."""
    first = await anext(pieces)
    if isinstance(first, Started):
        return first
    await pieces.aclose()
    if isinstance(first, Refused):
        refuse(first)
    raise AssertionError(f"an answer began with {type(first).__name__}")


def usage(prompt: TokenCount, answer: TokenCount) -> wire.Usage:
    return wire.Usage(
        prompt_tokens=prompt.total,
        completion_tokens=answer.total,
        total_tokens=prompt.total + answer.total,
        prompt_tokens_details=wire.TokenDetails(text_tokens=prompt.text, image_tokens=prompt.image),
        completion_tokens_details=wire.TokenDetails(text_tokens=answer.text, image_tokens=answer.image),
    )


def chat_completion(label: Label, answer: Answer) -> wire.ChatCompletion:
    parts: list[wire.Part] = [
        wire.TextPart(text=part) if isinstance(part, str) else wire.image_part(part) for part in answer.parts
    ]
    message = wire.AssistantMessage(
        content=answer.text, images=[part for part in parts if isinstance(part, wire.ImagePart)], parts=parts
    )
    return wire.ChatCompletion(
        id=label.id,
        created=label.created,
        model=label.model,
        choices=[wire.ChatChoice(message=message, finish_reason=answer.reason)],
        usage=usage(answer.prompt, answer.answer),
    )


def completion(label: Label, answer: Answer) -> wire.Completion:
    return wire.Completion(
        id=label.id,
        created=label.created,
        model=label.model,
        choices=[wire.TextChoice(text=answer.text, finish_reason=answer.reason)],
        usage=usage(answer.prompt, answer.answer),
    )


def images(label: Label, answers: list[Answer]) -> wire.Images:
    return wire.Images(
        created=label.created,
        data=[wire.EncodedImage(b64_json=base64.b64encode(png).decode()) for a in answers for png in a.images],
        usage=usage(_sum([a.prompt for a in answers]), _sum([a.answer for a in answers])),
    )


def _sum(counts: list[TokenCount]) -> TokenCount:
    return TokenCount(sum(c.text for c in counts), sum(c.image for c in counts))


async def chat_events(
    label: Label, started: Started, pieces: Pieces, options: wire.StreamOptions
) -> AsyncIterator[bytes]:
    """An answer as chat.completion.chunk events. The order of chunks is the order of text and images."""

    def chunk(delta: wire.Delta, reason: Literal["stop", "length"] | None = None) -> bytes:
        choice = wire.ChunkChoice(delta=delta, finish_reason=reason)
        return wire.event(wire.ChatChunk(id=label.id, created=label.created, model=label.model, choices=[choice]))

    async with aclosing(pieces):
        yield chunk(wire.Delta(role="assistant", content=""))
        async for piece in pieces:
            match piece:
                case TextPiece(text):
                    yield chunk(wire.Delta(content=text))
                case ImagePiece(png):
                    yield chunk(wire.Delta(images=[wire.image_part(png)]))
                case Drawing(done, total) if options.include_progress:
                    yield chunk(wire.Delta(drawing=wire.Progress(done=done, total=total)))
                case Finished(reason, count):
                    yield chunk(wire.Delta(), reason)
                    if options.include_usage:
                        yield wire.event(
                            wire.ChatChunk(
                                id=label.id,
                                created=label.created,
                                model=label.model,
                                choices=[],
                                usage=usage(started.prompt, count),
                            )
                        )
                case Refused():
                    yield _failed(piece)
    yield wire.END


async def completion_events(
    label: Label, started: Started, pieces: Pieces, options: wire.StreamOptions
) -> AsyncIterator[bytes]:
    """A text completion as events."""

    def chunk(choices: list[wire.TextChoice], total: wire.Usage | None = None) -> bytes:
        return wire.event(
            wire.Completion(id=label.id, created=label.created, model=label.model, choices=choices, usage=total)
        )

    async with aclosing(pieces):
        async for piece in pieces:
            match piece:
                case TextPiece(text):
                    yield chunk([wire.TextChoice(text=text)])
                case Finished(reason, count):
                    yield chunk([wire.TextChoice(text="", finish_reason=reason)])
                    if options.include_usage:
                        yield chunk([], usage(started.prompt, count))
                case Refused():
                    yield _failed(piece)
    yield wire.END


def _failed(piece: Refused) -> bytes:
    """An error after the response has begun: the status is sent already, so it is an event."""
    error = WireError(piece.message, status=piece.status, param=piece.param, code=piece.code)
    return wire.error_event(error.body)
