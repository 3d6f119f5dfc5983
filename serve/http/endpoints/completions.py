"""/v1/completions: the endpoint, its response and the chunks of its stream."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from calumma.model.document import Document
from calumma.serve.http import prompts
from calumma.serve.http.context import ServingContext, generate_all
from calumma.serve.http.streams import (
    EndWriter,
    EventWriter,
    GenerationOutput,
    ResponseMetadata,
    new_metadata,
    sse_stream,
    streaming_response,
    sum_tokens,
    total_usage,
    usage,
    wait_all_started,
)
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.logprobs import text_logprobs
from calumma.serve.http.wire.requests import CompletionRequest
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    OutputEvent,
    Started,
    TextDelta,
    Token,
    TokenCount,
)


def completion_response(
    label: ResponseMetadata, answers: list[GenerationOutput], n: int, logprobs: bool
) -> responses.Completion:
    def choice(index: int, answer: GenerationOutput) -> responses.TextChoice:
        echo = answer.echo or TextDelta("")
        shift = len(echo.text)
        return responses.TextChoice(
            index=index,
            text=echo.text + answer.text,
            finish_reason=answer.reason,
            logprobs=_text_logprobs(echo.tokens, answer.tokens, shift) if logprobs else None,
        )

    return responses.Completion(
        id=label.id,
        created=label.created,
        model=label.model,
        choices=[choice(index, answer) for index, answer in enumerate(answers)],
        usage=total_usage(answers, n),
    )


def _text_logprobs(echoed: tuple[Token, ...], tokens: list[Token], shift: int) -> responses.TextLogprobs:
    first, then = text_logprobs(list(echoed)), text_logprobs(tokens, shift)
    return responses.TextLogprobs(
        **{name: getattr(first, name) + getattr(then, name) for name in responses.TextLogprobs.model_fields}
    )


def completion_chunks(
    label: ResponseMetadata, started: list[Started], request: CompletionRequest
) -> tuple[list[bytes], EventWriter, EndWriter]:
    """text_completion events; an echo comes first."""
    shifts = [len(one.echo.text) if one.echo else 0 for one in started]

    def chunk(index: int, piece: TextDelta, shift: int, reason: FinishReason | None = None) -> bytes:
        logprobs = text_logprobs(list(piece.tokens), shift) if request.logprobs is not None else None
        choice = responses.TextChoice(index=index, text=piece.text, finish_reason=reason, logprobs=logprobs)
        return _completion([choice])

    def _completion(choices: list[responses.TextChoice], count: responses.Usage | None = None) -> bytes:
        return sse.event(
            responses.Completion(id=label.id, created=label.created, model=label.model, choices=choices, usage=count)
        )

    def chunks(index: int, piece: OutputEvent) -> list[bytes]:
        match piece:
            case TextDelta():
                return [chunk(index, piece, shifts[index])]
            case Finished(reason):
                return [chunk(index, TextDelta(""), 0, reason)]
            case ContentFiltered():
                return [chunk(index, TextDelta(""), 0, "content_filter")]
        return []

    def tail(answers: TokenCount) -> list[bytes]:
        if not request.options.include_usage:
            return []
        return [_completion([], usage(sum_tokens([one.prompt for one in started[:: request.n]]), answers))]

    first = [chunk(index, one.echo, 0) for index, one in enumerate(started) if one.echo]
    return first, chunks, tail


def add_completions(app: FastAPI, served: ServingContext) -> None:
    @app.post("/v1/completions", response_model=responses.Completion)
    async def complete(request: CompletionRequest) -> Any:
        model = served.model(request.model)
        served.require_choices(request.n * len(request.prompts), len(request.stops))
        label = new_metadata("cmpl", model)
        params = prompts.sampling_params(request, ["text"], model.sampling)
        most = served.limited(request.max_tokens, "max_tokens")
        jobs = []
        for number, prompt in enumerate(request.prompts):
            read: Document | tuple[int, ...] = prompts.plain_prompt(prompt) if isinstance(prompt, str) else prompt
            job = GenerationRequest(
                f"{label.id}-{number}", read, params, most, True, 0, request.stops, request.logprobs, echo=request.echo
            )
            jobs += prompts.numbered(job, request.n)
        if not request.stream:
            answers = await generate_all(served, jobs, model.name)
            return completion_response(label, answers, request.n, request.logprobs is not None)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await wait_all_started(begun)
        return streaming_response(sse_stream(begun, *completion_chunks(label, started, request)))
