"""Streams of output events: metered, collected, merged, and sent as server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from fastapi.responses import StreamingResponse

from calumma.serve.http.metrics import Metrics
from calumma.serve.http.tool_calls import AnswerEvent, AnswerStream, ToolCallDelta
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.http.wire.tools import Function, ToolCall
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    ImageOutput,
    ImageProgress,
    OutputStream,
    RequestFailed,
    Started,
    TextDelta,
    Token,
    TokenCount,
)

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EventWriter = Callable[[int, AnswerEvent], list[bytes]]  # (index of the choice, event) -> server-sent events
EndWriter = Callable[[TokenCount], list[bytes]]  # completion tokens of all choices -> the last server-sent events


@dataclass(frozen=True)
class ResponseMetadata:
    """What every response and chunk of an HTTP request carries. created: Unix time."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))


def new_metadata(kind: str, model: str) -> ResponseMetadata:
    return ResponseMetadata(f"{kind}-{uuid.uuid4().hex}", model)


@dataclass
class GenerationOutput:
    """The whole output of one request: texts and PNG files in their order, calls of tools, what of the prompt is
    echoed, tokens with log-probabilities, counts."""

    parts: list[str | bytes] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    echo: TextDelta | None = None
    prompt: TokenCount = field(default_factory=TokenCount)
    completion: TokenCount = field(default_factory=TokenCount)
    reason: FinishReason = "stop"
    refusal: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]

    def add(self, event: AnswerEvent) -> None:
        """Raises APIError when the request failed."""
        match event:
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
            case ToolCallDelta(index, arguments, id, name):
                if index == len(self.calls):
                    self.calls.append(ToolCall(id=id or "", function=Function(name=name or "", arguments="")))
                self.calls[index].function.arguments += arguments
            case Finished(reason, completion):
                self.reason, self.completion = finish_reason(reason, bool(self.calls)), completion
            case ContentFiltered(message, completion):
                self.reason, self.refusal, self.completion = "content_filter", message, completion
            case RequestFailed():
                raise_failure(event)


def finish_reason(reason: Literal["stop", "length"], called: bool) -> FinishReason:
    """called: the answer has calls of tools."""
    return "tool_calls" if called and reason == "stop" else reason


def raise_failure(event: RequestFailed) -> NoReturn:
    raise APIError(event.message, status=event.status, param=event.param, code=event.code)


async def metered(stream: OutputStream, metrics: Metrics, model: str, seconds: float) -> OutputStream:
    """The same events, measured as they pass; the request fails when its output is not whole after so many seconds."""
    timer = metrics.time_generation(model)
    deadline = asyncio.get_running_loop().time() + seconds
    end = "abandoned"
    try:
        with timer.running():
            async with aclosing(stream):
                while True:
                    try:
                        async with asyncio.timeout_at(deadline):
                            event = await anext(stream)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        end = "late"
                        yield RequestFailed(
                            504, f"the answer was not ready after {seconds:g} s, the most this server allows",
                            code="deadline_exceeded",
                        )  # fmt: skip
                        return
                    if isinstance(event, TextDelta | ImageOutput | ImageProgress):
                        timer.token()
                    match event:
                        case Started(prompt):
                            timer.prompt(prompt)
                        case ImageOutput(_, took):
                            timer.image(took)
                        case Finished(reason, completion):
                            end = reason
                            timer.completion(completion)
                        case ContentFiltered(_, completion):
                            end = "declined"
                            timer.completion(completion)
                        case RequestFailed(status):
                            end = "refused" if status < 500 else "failed"
                    yield event
    finally:
        timer.ended(end)


async def collect(stream: AnswerStream) -> GenerationOutput:
    """Wait for the whole output. Raises APIError when the request failed."""
    output = GenerationOutput()
    async with aclosing(stream):
        async for event in stream:
            output.add(event)
    return output


async def wait_started(stream: AnswerStream) -> Started:
    """Wait until the request is admitted, so that its failure still becomes an HTTP status. Raises APIError."""
    first = await anext(stream)
    if isinstance(first, Started):
        return first
    await stream.aclose()
    if isinstance(first, RequestFailed):
        raise_failure(first)
    raise AssertionError(f"an output began with {type(first).__name__}")


async def wait_all_started(streams: list[AnswerStream]) -> list[Started]:
    """`wait_started` for several requests at once; the first failure closes the others. Raises APIError."""
    found = await asyncio.gather(*map(wait_started, streams), return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    if errors:
        for stream in streams:
            await stream.aclose()
        raise errors[0]
    return [one for one in found if isinstance(one, Started)]


async def merge(streams: list[AnswerStream]) -> AsyncGenerator[tuple[int, AnswerEvent], None]:
    """(index of the stream, event) of several streams as they come. Closing it closes them all."""
    pending: dict[asyncio.Task[AnswerEvent], int] = {}

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
                    event = task.result()
                except StopAsyncIteration:
                    continue
                yield index, event
                ask(index)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def usage(prompt: TokenCount, completion: TokenCount) -> responses.Usage:
    return responses.Usage(
        prompt_tokens=prompt.total,
        completion_tokens=completion.total,
        total_tokens=prompt.total + completion.total,
        prompt_tokens_details=responses.TokenDetails(text_tokens=prompt.text, image_tokens=prompt.image),
        completion_tokens_details=responses.TokenDetails(text_tokens=completion.text, image_tokens=completion.image),
    )


def total_usage(outputs: Sequence[GenerationOutput], n: int) -> responses.Usage:
    """Each prompt counts once, whatever the number `n` of its choices."""
    return usage(sum_tokens([one.prompt for one in outputs[::n]]), sum_tokens([one.completion for one in outputs]))


def sum_tokens(counts: list[TokenCount]) -> TokenCount:
    return TokenCount(sum(count.text for count in counts), sum(count.image for count in counts))


async def sse_stream(
    streams: list[AnswerStream],
    first: list[bytes],
    write: EventWriter,
    write_end: EndWriter,
    last: bytes = sse.END,
) -> AsyncIterator[bytes]:
    """Several outputs as server-sent events: `first`, what `write` makes of each output event, then `write_end`, and
    `last`.

    An error after the response has begun is an event, for its status is sent already. It ends the stream.
    """
    counts: list[TokenCount] = []
    async with aclosing(merge(streams)) as events:
        if first:
            yield b"".join(first)
        async for index, event in events:
            if isinstance(event, RequestFailed):
                error = APIError(event.message, status=event.status, param=event.param, code=event.code)
                yield sse.error_event(error.body) + last
                return
            if isinstance(event, Finished | ContentFiltered):
                counts.append(event.completion)
            if written := write(index, event):
                yield b"".join(written)
        yield b"".join([*write_end(sum_tokens(counts)), last])


def streaming_response(events: AsyncIterator[bytes], headers: Mapping[str, str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={**UNBUFFERED, **headers})
