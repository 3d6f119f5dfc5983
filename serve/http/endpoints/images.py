"""/v1/images/generations and /v1/images/edits: the endpoints, their response and the events of their streams."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request, Response
from PIL import Image as PILImage

from calumma.serve.http.access.caller import behind, current_caller
from calumma.serve.http.context import ServingContext
from calumma.serve.http.endpoints.chat import chat_generation
from calumma.serve.http.image_loader import TOO_MANY
from calumma.serve.http.openapi import event_stream
from calumma.serve.http.prompts import expand_choices, image_prompt, sampling_params
from calumma.serve.http.streams import (
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
from calumma.serve.http.tool_calls import AnswerEvent
from calumma.serve.http.wire import responses, sse
from calumma.serve.http.wire.content import TextPart, image_part
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.forms import form_body, read_form, validated
from calumma.serve.http.wire.requests import ChatRequest, ImageRequest, Message, SamplingFields
from calumma.serve.http.wire.responses import EventKind
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    Started,
)


def add_images(app: FastAPI, context: ServingContext) -> None:
    form: dict[str, Any] = {
        "response_model": responses.Images,
        "response_model_exclude_none": True,
        "responses": event_stream("an image_generation event"),
    }

    @app.post("/v1/images/generations", **form)
    async def draw(request: ImageRequest, response: Response) -> Any:
        """Pictures of a prompt."""
        response.headers.update(request.headers)
        model = context.model(request.model)
        current_caller().take(request.n)
        metadata = new_metadata("img", model.name)
        one = GenerationRequest(
            metadata.id,
            image_prompt(request.prompt),
            sampling_params(request, ["image"], model.sampling),
            progress=True,
            previews=request.partial_images if request.stream else 0,
            priority=behind(request.priority),
            salt=request.salt,
        )
        return await _draw(context, request, one, metadata, "image_generation")

    @app.post("/v1/images/edits", openapi_extra=form_body("ImageRequest", {"image": True}), **form)
    async def edit(asked: Request, response: Response) -> Any:
        """As generations, after the images of the form."""
        values, files = await read_form(asked, ("image", "mask"))
        request = validated(ImageRequest, values)
        if "mask" in files:
            raise APIError("this server has no `mask`; leave it out", param="mask", code="unsupported")
        if not files.get("image"):
            raise APIError("image: is required", param="image", code="invalid_value")
        response.headers.update(request.headers)
        model = context.model(request.model)
        current_caller().take(request.n)
        metadata = new_metadata("img", model.name)
        parts = [image_part(data) for data in files["image"]]
        message = Message(role="user", content=[*parts, TextPart(text=request.prompt)])
        own = request.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        try:
            one = await chat_generation(
                context, ChatRequest(messages=[message], modalities=["image"], **own), metadata.id
            )
        except APIError as error:
            raise _renamed(error) from error
        one = replace(one, previews=request.partial_images if request.stream else 0)
        return await _draw(context, request, one, metadata, "image_edit")


async def _draw(
    context: ServingContext, request: ImageRequest, one: GenerationRequest, metadata: ResponseMetadata, kind: EventKind
) -> Any:
    """The answer to both: `n` images, whole or as events."""
    side = 0
    if request.stream or request.size not in (None, "auto"):
        side = int((await context.facts.known(metadata.model)).get("image_size", 0))
        if not side:
            raise APIError("the model has not told the size of its images yet; try again", status=503)
        if request.size not in (None, "auto", f"{side}x{side}"):
            raise APIError(f"this model draws {side}x{side}; found size {request.size}", param="size")
    choices = expand_choices(one, request.n)
    try:
        if not request.stream:
            return images_response(metadata, await context.generate_all(choices, metadata.model), request)
        streams = [context.generate(choice, metadata.model) for choice in choices]
        started = await wait_all_started(streams)
    except APIError as error:
        raise _renamed(error) from error
    write = image_events(metadata, started, request, side, kind)
    return streaming_response(sse_stream(streams, [], write, lambda completion: []), request.headers)


def _renamed(error: APIError) -> APIError:
    """An error of the conversation that a prompt becomes, naming the endpoint's own field."""
    told = error.body["error"]
    param = told["param"] or ""
    if param.startswith("messages"):
        told["param"] = "image" if "image_url" in param or told["code"] == TOO_MANY else "prompt"
    return error


def encode_image(png: bytes, form: str, quality: int) -> str:
    """A PNG file in another format ("png", "jpeg" or "webp"), as base64."""
    if form == "png":
        return base64.b64encode(png).decode()
    buffer = io.BytesIO()
    with PILImage.open(io.BytesIO(png)) as opened:
        opened.convert("RGB").save(buffer, format=form.upper(), quality=max(1, quality))
    return base64.b64encode(buffer.getvalue()).decode()


def images_response(
    metadata: ResponseMetadata, outputs: list[GenerationOutput], request: ImageRequest
) -> responses.Images:
    """Raises APIError where the safety policy declined one: there is no image to send in its place."""
    for output in outputs:
        if output.refusal is not None:
            raise APIError(output.refusal, code="content_policy_violation", param="prompt")
    form = request.output_format

    def encoded(png: bytes) -> responses.EncodedImage:
        data = encode_image(png, form, request.output_compression)
        if request.response_format == "url":
            return responses.EncodedImage(url=f"data:image/{form};base64,{data}")
        return responses.EncodedImage(b64_json=data)

    return responses.Images(
        created=metadata.created,
        data=[encoded(png) for output in outputs for png in output.images],
        output_format=form,
        usage=total_usage(outputs, len(outputs)),
    )


def image_events(
    metadata: ResponseMetadata, started: list[Started], request: ImageRequest, side: int, kind: EventKind
) -> EventWriter:
    """Events of that kind: partial images while one is drawn, then the image. side: of it, in pixels."""
    form = request.output_format
    partial = [0] * len(started)  # sent so far
    images: dict[int, bytes] = {}

    def encoded(png: bytes) -> str:
        return encode_image(png, form, request.output_compression)

    def write(index: int, event: AnswerEvent) -> list[bytes]:
        match event:
            case ImageProgress(preview=bytes(png)):
                partial[index] += 1
                chunk = responses.ImageEvent(
                    type=f"{kind}.partial_image",
                    b64_json=encoded(png),
                    created_at=metadata.created,
                    size=f"{side}x{side}",
                    output_format=form,
                    partial_image_index=partial[index] - 1,
                )
                return [sse.image_event(chunk)]
            case ImageOutput(png):
                images[index] = png
            case Finished(_, completion):
                counted = usage(started[index].prompt, completion)
                chunk = responses.ImageEvent(
                    type=f"{kind}.completed",
                    b64_json=encoded(images[index]),
                    created_at=metadata.created,
                    size=f"{side}x{side}",
                    output_format=form,
                    usage=responses.ImageUsage(
                        input_tokens=counted.prompt_tokens,
                        output_tokens=counted.completion_tokens,
                        total_tokens=counted.total_tokens,
                        input_tokens_details=counted.prompt_tokens_details,
                    ),
                )
                return [sse.image_event(chunk)]
            case ContentFiltered(message):
                error = APIError(message, code="content_policy_violation", param="prompt")
                return [sse.error_event(error.body)]
        return []

    return write
