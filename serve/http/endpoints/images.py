"""/v1/images/generations: the endpoint, its response and the events of its stream."""

from __future__ import annotations

import base64
import io
from typing import Any

from fastapi import FastAPI
from PIL import Image as PILImage

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
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import ImageRequest
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    Started,
)


def converted(png: bytes, form: str, quality: int) -> bytes:
    """A PNG file in another format."""
    if form == "png":
        return png
    buffer = io.BytesIO()
    with PILImage.open(io.BytesIO(png)) as opened:
        opened.convert("RGB").save(buffer, format=form.upper(), quality=max(1, quality))
    return buffer.getvalue()


def images_response(
    label: ResponseMetadata, answers: list[GenerationOutput], request: ImageRequest
) -> responses.Images:
    """Raises WireError where the safety policy declined one: there is no image to send in its place."""
    for answer in answers:
        if answer.refusal is not None:
            raise APIError(answer.refusal, code="content_policy_violation", param="prompt")
    form, quality = request.output_format, request.output_compression

    def encoded(png: bytes) -> responses.EncodedImage:
        data = base64.b64encode(converted(png, form, quality)).decode()
        if request.response_format == "url":
            return responses.EncodedImage(url=f"data:image/{form};base64,{data}")
        return responses.EncodedImage(b64_json=data)

    return responses.Images(
        created=label.created,
        data=[encoded(png) for a in answers for png in a.images],
        output_format=form,
        usage=total_usage(answers, len(answers)),
    )


def image_events(
    label: ResponseMetadata, started: list[Started], request: ImageRequest, size: int
) -> tuple[EventWriter, EndWriter]:
    """image_generation events: partial images while one is drawn, and it when it is there."""
    form, quality = request.output_format, request.output_compression
    shown = [0] * len(started)

    def encoded(png: bytes) -> str:
        return base64.b64encode(converted(png, form, quality)).decode()

    def chunks(index: int, piece: OutputEvent) -> list[bytes]:
        match piece:
            case ImageProgress(preview=bytes(png)):
                shown[index] += 1
                event = responses.ImageEvent(
                    type="image_generation.partial_image",
                    b64_json=encoded(png),
                    created_at=label.created,
                    size=f"{size}x{size}",
                    output_format=form,
                    partial_image_index=shown[index] - 1,
                )
                return [sse.image_event(event)]
            case ImageOutput(png):
                held[index] = png
            case Finished(_, count):
                counted = usage(started[index].prompt, count)
                event = responses.ImageEvent(
                    type="image_generation.completed",
                    b64_json=encoded(held[index]),
                    created_at=label.created,
                    size=f"{size}x{size}",
                    output_format=form,
                    usage=responses.ImageUsage(
                        input_tokens=counted.prompt_tokens,
                        output_tokens=counted.completion_tokens,
                        total_tokens=counted.total_tokens,
                        input_tokens_details=counted.prompt_tokens_details,
                    ),
                )
                return [sse.image_event(event)]
            case ContentFiltered(message):
                error = APIError(message, code="content_policy_violation", param="prompt")
                return [sse.error_event(error.body)]
        return []

    held: dict[int, bytes] = {}
    return chunks, lambda counts: []


def add_images(app: FastAPI, served: ServingContext) -> None:
    @app.post("/v1/images/generations", response_model=responses.Images, response_model_exclude_none=True)
    async def draw(request: ImageRequest) -> Any:
        model = served.model(request.model)
        label = new_metadata("img", model)
        side = 0
        if request.stream or request.size not in (None, "auto"):
            side = int((await served.backends[model.name].describe())["image_size"])
            if request.size not in (None, "auto", f"{side}x{side}"):
                raise APIError(f"this model draws {side}x{side}; found size {request.size}", param="size")
        params = prompts.sampling_params(request, ["image"], model.sampling)
        job = GenerationRequest(
            label.id,
            prompts.drawing_prompt(request.prompt),
            params,
            progress=True,
            previews=request.partial_images if request.stream else 0,
        )
        jobs = prompts.numbered(job, request.n)
        if not request.stream:
            return images_response(label, await generate_all(served, jobs, model.name), request)
        begun = [served.begin(one, model.name) for one in jobs]
        started = await wait_all_started(begun)
        chunks, tail = image_events(label, started, request, side)
        return streaming_response(sse_stream(begun, [], chunks, tail))
