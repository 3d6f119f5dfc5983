"""/v1/chat/completions: the endpoint, its response and the chunks of its stream."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

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
    total_usage,
    usage,
    wait_all_started,
)
from calumma.serve.http.wire import content, responses, sse
from calumma.serve.http.wire.logprobs import chat_logprobs
from calumma.serve.http.wire.requests import ChatRequest
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    Started,
    TextDelta,
    TokenCount,
)


def chat_response(
    label: ResponseMetadata, answers: list[GenerationOutput], logprobs: bool = False
) -> responses.ChatCompletion:
    def choice(index: int, answer: GenerationOutput) -> responses.ChatChoice:
        parts: list[content.Part] = [
            content.TextPart(text=part) if isinstance(part, str) else content.image_part(part) for part in answer.parts
        ]
        message = responses.AssistantMessage(
            content=answer.text,
            refusal=answer.refusal,
            images=[part for part in parts if isinstance(part, content.ImagePart)],
            parts=parts,
        )
        return responses.ChatChoice(
            index=index,
            message=message,
            finish_reason=answer.reason,
            logprobs=chat_logprobs(answer.tokens) if logprobs else None,
        )

    return responses.ChatCompletion(
        id=label.id,
        created=label.created,
        model=label.model,
        choices=[choice(index, answer) for index, answer in enumerate(answers)],
        usage=total_usage(answers, len(answers)),
    )


def chat_chunks(
    label: ResponseMetadata, started: list[Started], request: ChatRequest
) -> tuple[list[bytes], EventWriter, EndWriter]:
    """chat.completion.chunk events: the first of each answer, those of its pieces, the last of all. The order of
    chunks is the order of text and images."""
    options = request.options

    def chunk(
        index: int,
        delta: responses.Delta,
        reason: FinishReason | None = None,
        logprobs: responses.ChatLogprobs | None = None,
    ) -> bytes:
        choice = responses.ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return sse.event(responses.ChatChunk(id=label.id, created=label.created, model=label.model, choices=[choice]))

    def chunks(index: int, piece: OutputEvent) -> list[bytes]:
        match piece:
            case TextDelta(text, tokens):
                logprobs = chat_logprobs(list(tokens)) if request.logprobs else None
                return [chunk(index, responses.Delta(content=text), logprobs=logprobs)]
            case ImageOutput(png):
                return [chunk(index, responses.Delta(images=[content.image_part(png)]))]
            case ImageProgress(done, of, preview) if options.include_progress or preview:
                shown = content.data_url(preview) if preview else None
                progress = responses.Progress(done=done, total=of, preview=shown)
                return [chunk(index, responses.Delta(drawing=progress))]
            case Finished(reason):
                return [chunk(index, responses.Delta(), reason)]
            case ContentFiltered(message):
                return [
                    chunk(index, responses.Delta(refusal=message)),
                    chunk(index, responses.Delta(), "content_filter"),
                ]
        return []

    def tail(answers: TokenCount) -> list[bytes]:
        if not options.include_usage:
            return []
        last = responses.ChatChunk(
            id=label.id,
            created=label.created,
            model=label.model,
            choices=[],
            usage=usage(started[0].prompt, answers),
        )
        return [sse.event(last)]

    first = [chunk(index, responses.Delta(role="assistant", content="")) for index in range(len(started))]
    return first, chunks, tail


def add_chat(app: FastAPI, served: ServingContext) -> None:
    @app.post("/v1/chat/completions", response_model=responses.ChatCompletion)
    async def chat(request: ChatRequest) -> Any:
        model = served.model(request.model)
        served.require_choices(request.n, len(request.stops))
        label = new_metadata("chatcmpl", model)
        job = GenerationRequest(
            label.id,
            await asyncio.to_thread(prompts.chat_prompt, request, served.pictures),
            prompts.sampling_params(request, request.modalities, model.sampling),
            served.limited(request.limit, "max_completion_tokens" if request.max_completion_tokens else "max_tokens"),
            progress=True,
            previews=request.options.partial_images if request.stream else 0,
            stop=request.stops,
            logprobs=request.alternatives,
            begin_with_image=request.begin_with == "image",
        )
        jobs = prompts.numbered(job, request.n)
        if not request.stream:
            return chat_response(label, await generate_all(served, jobs, model.name), request.logprobs)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await wait_all_started(begun)
        return streaming_response(sse_stream(begun, *chat_chunks(label, started, request)))
