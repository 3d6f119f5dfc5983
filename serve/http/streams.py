"""Streams of output events: measured, collected, merged, and sent as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NoReturn

from fastapi.responses import StreamingResponse

from calumma.serve.http.metrics import Metrics
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    Token,
    TokenCount,
)
from calumma.serve.settings import ModelSettings

OutputStream = AsyncGenerator[OutputEvent, None]
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EndWriter = Callable[[TokenCount], list[bytes]]
EventWriter = Callable[[int, OutputEvent], list[bytes]]


@dataclass(frozen=True)
class ResponseMetadata:
    """What every response and chunk of a request carries."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def new_metadata(kind: str, model: ModelSettings) -> ResponseMetadata:
    return ResponseMetadata(f"{kind}-{uuid.uuid4().hex}", model.name)


@dataclass
class GenerationOutput:
    """A whole answer: texts and PNG files in their order; what of the prompt is echoed, and log-probabilities."""

    parts: list[str | bytes] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    echo: TextDelta | None = None
    prompt: TokenCount = field(default_factory=TokenCount)
    answer: TokenCount = field(default_factory=TokenCount)
    reason: FinishReason = "stop"
    refusal: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    def add(self, piece: OutputEvent) -> None:
        match piece:
            case Started(prompt, echo):
                self.prompt, self.echo = prompt, echo
            case TextDelta(text, tokens):
                self.tokens += tokens
                if self.parts and isinstance(self.parts[-1], str):
                    self.parts[-1] += text
                elif text:
                    self.parts.append(text)
            case ImageOutput(png):
                self.parts.append(png)
            case Finished(reason, answer):
                self.reason, self.answer = reason, answer
            case ContentFiltered(message, answer):
                self.reason, self.refusal, self.answer = "content_filter", message, answer
            case RequestFailed():
                raise_failure(piece)


def raise_failure(piece: RequestFailed) -> NoReturn:
    raise APIError(piece.message, status=piece.status, param=piece.param, code=piece.code)


async def metered(pieces: OutputStream, metrics: Metrics, model: str, seconds: float) -> OutputStream:
    """The same pieces, counted as they pass; refused when the answer is not whole after so many seconds."""
    watch = metrics.answering(model)
    end = asyncio.get_running_loop().time() + seconds
    how = "abandoned"
    try:
        with watch.running():
            async with aclosing(pieces):
                while True:
                    try:
                        async with asyncio.timeout_at(end):
                            piece = await anext(pieces)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        how = "late"
                        yield RequestFailed(
                            504, f"the answer was not ready after {seconds:g} s, the most this server allows",
                            code="deadline_exceeded",
                        )  # fmt: skip
                        return
                    if isinstance(piece, TextDelta | ImageOutput | ImageProgress):
                        watch.token()
                    match piece:
                        case Started(prompt):
                            watch.prompt(prompt)
                        case ImageOutput(_, took):
                            watch.image(took)
                        case Finished(reason, answer):
                            how = reason
                            watch.answer(answer)
                        case ContentFiltered(_, answer):
                            how = "declined"
                            watch.answer(answer)
                        case RequestFailed(status):
                            how = "refused" if status < 500 else "failed"
                    yield piece
    finally:
        watch.ended(how)


async def collect(pieces: OutputStream) -> GenerationOutput:
    """Wait for the whole answer. Raises WireError when the job was refused or failed."""
    answer = GenerationOutput()
    async with aclosing(pieces):
        async for piece in pieces:
            answer.add(piece)
    return answer


async def wait_started(pieces: OutputStream) -> Started:
    """Wait until the job is taken in, so that a refusal still becomes an HTTP status. Raises WireError."""
    first = await anext(pieces)
    if isinstance(first, Started):
        return first
    await pieces.aclose()
    if isinstance(first, RequestFailed):
        raise_failure(first)
    raise AssertionError(f"an answer began with {type(first).__name__}")


async def wait_all_started(streams: list[OutputStream]) -> list[Started]:
    """`accepted` for several jobs at once; the first refusal closes the others. Raises WireError."""
    found = await asyncio.gather(*(wait_started(pieces) for pieces in streams), return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        for pieces in streams:
            await pieces.aclose()
        raise errors[0]
    return [one for one in found if isinstance(one, Started)]


async def merge(streams: list[OutputStream]) -> AsyncGenerator[tuple[int, OutputEvent], None]:
    """The pieces of several answers as they come, with the answer's number. Closing it closes them all."""
    pending: dict[asyncio.Task[OutputEvent], int] = {}

    def ask(index: int) -> None:
        pending[asyncio.ensure_future(anext(streams[index]))] = index

    try:
        for index in range(len(streams)):
            ask(index)
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                yield index, piece
                ask(index)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for pieces in streams:
            await pieces.aclose()


def usage(prompt: TokenCount, answer: TokenCount) -> responses.Usage:
    return responses.Usage(
        prompt_tokens=prompt.total,
        completion_tokens=answer.total,
        total_tokens=prompt.total + answer.total,
        prompt_tokens_details=responses.TokenDetails(text_tokens=prompt.text, image_tokens=prompt.image),
        completion_tokens_details=responses.TokenDetails(text_tokens=answer.text, image_tokens=answer.image),
    )


def sum_tokens(counts: list[TokenCount]) -> TokenCount:
    return TokenCount(sum(c.text for c in counts), sum(c.image for c in counts))


def total_usage(answers: list[GenerationOutput], n: int) -> responses.Usage:
    """Each of the prompts counts once, whatever the number `n` of its answers."""
    return usage(sum_tokens([a.prompt for a in answers[::n]]), sum_tokens([a.answer for a in answers]))


async def sse_stream(
    streams: list[OutputStream],
    first: list[bytes],
    chunks: Callable[[int, OutputEvent], list[bytes]],
    tail: Callable[[TokenCount], list[bytes]],
) -> AsyncIterator[bytes]:
    """Several answers as server-sent events: what comes first, what `chunks` writes for a piece of one of them, and
    the `tail`, given all tokens.

    An error after the response has begun is an event, for its status is sent already. It ends the stream.
    """
    counts: list[TokenCount] = []
    async with aclosing(merge(streams)) as pieces:
        if first:
            yield b"".join(first)
        async for index, piece in pieces:
            if isinstance(piece, RequestFailed):
                error = APIError(piece.message, status=piece.status, param=piece.param, code=piece.code)
                yield sse.error_event(error.body) + sse.END
                return
            if isinstance(piece, Finished | ContentFiltered):
                counts.append(piece.answer)
            if found := chunks(index, piece):
                yield b"".join(found)
        yield b"".join([*tail(sum_tokens(counts)), sse.END])


def streaming_response(sse_stream: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(sse_stream, media_type="text/event-stream", headers=UNBUFFERED)
