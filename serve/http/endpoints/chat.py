"""/v1/chat/completions: the endpoint, its response and the chunks of its stream."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response

from calumma.serve.http.access.caller import behind, current_caller
from calumma.serve.http.context import ServingContext
from calumma.serve.http.openapi import event_stream
from calumma.serve.http.prompts import chat_prompt, expand_choices, image_sources, sampling_params
from calumma.serve.http.streams import (
    EndWriter,
    EventWriter,
    GenerationOutput,
    ResponseMetadata,
    finish_reason,
    new_metadata,
    sse_stream,
    streaming_response,
    total_usage,
    usage,
    wait_all_started,
)
from calumma.serve.http.tool_calls import AnswerEvent, ToolCallDelta
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.content import ContentPart, ImagePart, TextPart, data_url, image_part
from calumma.serve.http.wire.logprobs import chat_logprobs
from calumma.serve.http.wire.requests import ChatRequest
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.http.wire.tools import FunctionDelta, ToolCallChunk
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    Started,
    TextDelta,
    TokenCount,
)


def add_chat(app: FastAPI, context: ServingContext) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=responses.ChatCompletion,
        responses=event_stream("a chat.completion.chunk"),
    )
    async def chat(request: ChatRequest, response: Response) -> Any:
        """An answer in words and pictures. `message.parts` has both in order, `message.content` the words alone and
        `message.images` the pictures; a stream has them as chunks, in order. Calls of `tools` come last, and their
        arguments follow the schema."""
        response.headers.update(request.headers)
        model = context.model(request.model)
        metadata = new_metadata("chatcmpl", model.name)
        one = await chat_generation(context, request, metadata.id)
        choices = expand_choices(one, request.n)
        if not request.stream:
            return chat_response(metadata, await context.generate_all(choices, model.name), request.logprobs)
        streams = [context.generate(choice, model.name) for choice in choices]
        started = await wait_all_started(streams)
        return streaming_response(sse_stream(streams, *chat_chunks(metadata, started, request)), request.headers)


async def chat_generation(context: ServingContext, request: ChatRequest, id: str) -> GenerationRequest:
    """What the engine is asked. Raises APIError."""
    model = context.model(request.model)
    context.require_choices(request.n, len(request.stops))
    current_caller().take(request.n)
    limit = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
    images = await context.load_images(image_sources(request), model.name)
    return GenerationRequest(
        id,
        chat_prompt(request, images),
        sampling_params(request, request.modalities, model.sampling),
        context.max_tokens(request.limit, limit),
        progress=True,
        previews=request.options.partial_images if request.stream else 0,
        stop=request.stops,
        logprobs=request.alternatives,
        begin_with_image=request.begin_with == "image",
        bad_words=request.bad_words,
        priority=behind(request.priority),
        salt=request.salt,
        grammar_param=request.grammar_field,
    )


def chat_response(
    metadata: ResponseMetadata, outputs: list[GenerationOutput], logprobs: bool = False
) -> responses.ChatCompletion:
    def choice(index: int, output: GenerationOutput) -> responses.ChatChoice:
        parts: list[ContentPart] = [
            TextPart(text=part) if isinstance(part, str) else image_part(part) for part in output.parts
        ]
        message = responses.AssistantMessage(
            content=output.text if output.text or not output.calls else None,
            refusal=output.refusal,
            images=[part for part in parts if isinstance(part, ImagePart)],
            parts=parts,
            tool_calls=output.calls or None,
        )
        return responses.ChatChoice(
            index=index,
            message=message,
            finish_reason=output.reason,
            logprobs=chat_logprobs(output.tokens) if logprobs else None,
        )

    return responses.ChatCompletion(
        id=metadata.id,
        created=metadata.created,
        model=metadata.model,
        choices=[choice(index, output) for index, output in enumerate(outputs)],
        usage=total_usage(outputs, len(outputs)),
    )


def chat_chunks(
    metadata: ResponseMetadata, started: list[Started], request: ChatRequest
) -> tuple[list[bytes], EventWriter, EndWriter]:
    """chat.completion.chunk events: the first of each choice, those of its output events, the last of all. The order
    of chunks is the order of text and images."""
    options = request.options
    drawn = [0] * len(started)  # images of each choice so far
    called = [False] * len(started)

    def chunk(
        index: int,
        delta: responses.Delta,
        reason: FinishReason | None = None,
        logprobs: responses.ChatLogprobs | None = None,
    ) -> bytes:
        choice = responses.ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return sse.event(
            responses.ChatChunk(id=metadata.id, created=metadata.created, model=metadata.model, choices=[choice])
        )

    def write(index: int, event: AnswerEvent) -> list[bytes]:
        match event:
            case TextDelta(text, tokens):
                logprobs = chat_logprobs(list(tokens)) if request.logprobs else None
                return [chunk(index, responses.Delta(content=text), logprobs=logprobs)]
            case ImageOutput(png):
                drawn[index] += 1
                image = responses.IndexedImage(index=drawn[index] - 1, **image_part(png).model_dump())
                return [chunk(index, responses.Delta(images=[image]))]
            case ImageProgress(done, of, preview) if options.include_progress or preview:
                shown = data_url(preview) if preview else None
                progress = responses.Progress(done=done, total=of, preview=shown)
                return [chunk(index, responses.Delta(drawing=progress))]
            case ToolCallDelta(number, arguments, id, name):
                called[index] = True
                call = ToolCallChunk(
                    index=number,
                    id=id,
                    type="function" if id else None,
                    function=FunctionDelta(name=name, arguments=arguments),
                )
                return [chunk(index, responses.Delta(tool_calls=[call]))]
            case Finished(reason):
                return [chunk(index, responses.Delta(), finish_reason(reason, called[index]))]
            case ContentFiltered(message):
                return [
                    chunk(index, responses.Delta(refusal=message)),
                    chunk(index, responses.Delta(), "content_filter"),
                ]
        return []

    def write_end(completion: TokenCount) -> list[bytes]:
        if not options.include_usage:
            return []
        last = responses.ChatChunk(
            id=metadata.id,
            created=metadata.created,
            model=metadata.model,
            choices=[],
            usage=usage(started[0].prompt, completion),
        )
        return [sse.event(last)]

    first = [chunk(index, responses.Delta(role="assistant", content="")) for index in range(len(started))]
    return first, write, write_end
