"""/v1/completions: the endpoint, its response and the chunks of its stream."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response

from calumma.serve.http.access.caller import behind, current_caller
from calumma.serve.http.context import ServingContext
from calumma.serve.http.openapi import event_stream
from calumma.serve.http.prompts import expand_choices, plain_prompt, sampling_params
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
from calumma.serve.http.tool_calls import AnswerEvent
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.logprobs import text_logprobs
from calumma.serve.http.wire.requests import CompletionRequest
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    Started,
    TextDelta,
    Token,
    TokenCount,
)


def add_completions(app: FastAPI, context: ServingContext) -> None:
    @app.post("/v1/completions", response_model=responses.Completion, responses=event_stream("a text_completion"))
    async def complete(request: CompletionRequest, response: Response) -> Any:
        """Text that goes on from a prompt, of text or token ids."""
        response.headers.update(request.headers)
        model = context.model(request.model)
        answers = request.n * len(request.prompts)
        context.require_choices(answers, len(request.stops))
        current_caller().take(answers)
        metadata = new_metadata("cmpl", model.name)
        params = sampling_params(request, ["text"], model.sampling)
        max_tokens = context.max_tokens(request.max_tokens, "max_tokens")
        choices = []
        for number, prompt in enumerate(request.prompts):
            one = GenerationRequest(
                f"{metadata.id}-{number}",
                plain_prompt(prompt) if isinstance(prompt, str) else prompt,
                params,
                max_tokens,
                progress=True,
                stop=request.stops,
                logprobs=request.logprobs,
                echo=request.echo,
                bad_words=request.bad_words,
                priority=behind(request.priority),
                salt=request.salt,
                grammar_param=request.grammar_field,
            )
            choices += expand_choices(one, request.n)
        if not request.stream:
            outputs = await context.generate_all(choices, model.name)
            return completion_response(metadata, outputs, request.n, request.logprobs is not None)
        streams = [context.generate(choice, model.name) for choice in choices]
        started = await wait_all_started(streams)
        return streaming_response(sse_stream(streams, *completion_chunks(metadata, started, request)), request.headers)


def completion_response(
    metadata: ResponseMetadata, outputs: list[GenerationOutput], n: int, logprobs: bool
) -> responses.Completion:
    def choice(index: int, output: GenerationOutput) -> responses.TextChoice:
        echo = output.echo or TextDelta("")
        return responses.TextChoice(
            index=index,
            text=echo.text + output.text,
            finish_reason=output.reason,
            logprobs=_joined_logprobs(echo.tokens, output.tokens, len(echo.text)) if logprobs else None,
        )

    return responses.Completion(
        id=metadata.id,
        created=metadata.created,
        model=metadata.model,
        choices=[choice(index, output) for index, output in enumerate(outputs)],
        usage=total_usage(outputs, n),
    )


def _joined_logprobs(echoed: tuple[Token, ...], tokens: list[Token], offset: int) -> responses.TextLogprobs:
    """Of an echoed prompt and the text that follows it. offset: characters of the echo."""
    first, then = text_logprobs(list(echoed)), text_logprobs(tokens, offset)
    return responses.TextLogprobs(
        **{name: getattr(first, name) + getattr(then, name) for name in responses.TextLogprobs.model_fields}
    )


def completion_chunks(
    metadata: ResponseMetadata, started: list[Started], request: CompletionRequest
) -> tuple[list[bytes], EventWriter, EndWriter]:
    """text_completion events; an echo comes first."""
    offsets = [len(one.echo.text) if one.echo else 0 for one in started]

    def chunk(choices: list[responses.TextChoice], count: responses.Usage | None = None) -> bytes:
        return sse.event(
            responses.Completion(
                id=metadata.id, created=metadata.created, model=metadata.model, choices=choices, usage=count
            )
        )

    def text(index: int, delta: TextDelta, offset: int, reason: FinishReason | None = None) -> bytes:
        logprobs = text_logprobs(list(delta.tokens), offset) if request.logprobs is not None else None
        return chunk([responses.TextChoice(index=index, text=delta.text, finish_reason=reason, logprobs=logprobs)])

    def write(index: int, event: AnswerEvent) -> list[bytes]:
        match event:
            case TextDelta():
                return [text(index, event, offsets[index])]
            case Finished(reason):
                return [text(index, TextDelta(""), 0, reason)]
            case ContentFiltered():
                return [text(index, TextDelta(""), 0, "content_filter")]
        return []

    def write_end(completion: TokenCount) -> list[bytes]:
        if not request.options.include_usage:
            return []
        return [chunk([], usage(sum_tokens([one.prompt for one in started[:: request.n]]), completion))]

    first = [text(index, one.echo, 0) for index, one in enumerate(started) if one.echo]
    return first, write, write_end
