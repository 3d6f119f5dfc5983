"""/v1/responses: the endpoint, its response and the events of its stream."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Response

from calumma.serve.http.context import ServingContext
from calumma.serve.http.endpoints.chat import chat_generation
from calumma.serve.http.openapi import event_stream
from calumma.serve.http.streams import (
    GenerationOutput,
    ResponseMetadata,
    collect,
    new_metadata,
    sse_stream,
    streaming_response,
    wait_started,
)
from calumma.serve.http.tool_calls import AnswerEvent, ToolCallDelta
from calumma.serve.http.wire import responses_api as wire
from calumma.serve.http.wire import sse
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.responses import FinishReason
from calumma.serve.protocol import (
    ContentFiltered,
    Finished,
    ImageOutput,
    ImageProgress,
    Started,
    TextDelta,
    TokenCount,
)


def add_responses(app: FastAPI, context: ServingContext) -> None:
    @app.post(
        "/v1/responses", response_model=wire.ResponseObject, responses=event_stream("an event of the Responses API")
    )
    async def respond(request: wire.ResponsesRequest, response: Response) -> Any:
        """An answer in words and pictures, as OpenAI's Responses API has them: `output` holds messages and
        `image_generation_call` items in their order, then calls of functions. Nothing is kept."""
        response.headers.update(request.headers)
        model = context.model(request.model)
        metadata = new_metadata("resp", model.name)
        try:
            one = await chat_generation(context, request.chat(), metadata.id)
            one = replace(one, previews=request.previews if request.stream else 0)
            stream = context.generate(one, model.name)
            answer = Answer(metadata, request)
            if not request.stream:
                return answer.whole(await collect(stream))
            started = await wait_started(stream)
        except APIError as error:
            raise wire.renamed(error, request) from error
        events = sse_stream(
            [stream], answer.write(started), lambda _, event: answer.write(event), answer.write_end, last=b""
        )
        return streaming_response(events, request.headers)


class Answer:
    """Output events in, events of the Responses API out: created, items with their deltas, completed."""

    def __init__(self, metadata: ResponseMetadata, request: wire.ResponsesRequest) -> None:
        self._metadata, self._request = metadata, request
        self._items: list[wire.OutputItem] = []
        self._open: wire.OutputItem | None = None  # the last of the items, while it is under way
        self._number = 0  # of the next event
        self._previews = 0  # of the image under way
        self._prompt = TokenCount()
        self._reason: FinishReason = "stop"

    def write(self, event: AnswerEvent) -> list[bytes]:
        match event:
            case Started(prompt):
                self._prompt = prompt
                begun = self._response("in_progress").model_dump(mode="json")
                return [
                    self._event("response.created", response=begun),
                    self._event("response.in_progress", response=begun),
                ]
            case TextDelta(text) if text:
                return self._text(text)
            case ImageProgress(_, _, preview):
                return [*self._image(), *(self._preview(preview) if preview else ())]
            case ImageOutput(png):
                return self._image_done(png)
            case ToolCallDelta():
                return self._call(event)
            case ContentFiltered(message):
                self._reason = "content_filter"
                return [*self._close(), *self._refuse(message)]
            case Finished(reason):
                self._reason = reason
                return self._close("incomplete" if reason == "length" else "completed")
        return []

    def whole(self, output: GenerationOutput) -> wire.ResponseObject:
        """The answer at once, without events."""
        self.write(Started(output.prompt))
        for part in output.parts:
            self.write(TextDelta(part) if isinstance(part, str) else ImageOutput(part))
        for number, call in enumerate(output.calls):
            self.write(ToolCallDelta(number, call.function.arguments, call.id, call.function.name))
        if output.refusal is not None:
            self.write(ContentFiltered(output.refusal))
        return self.ended(output.reason, output.completion)

    def write_end(self, completion: TokenCount) -> list[bytes]:
        response = self.ended(self._reason, completion)
        return [self._event(f"response.{response.status}", response=response.model_dump(mode="json"))]

    def ended(self, reason: FinishReason, completion: TokenCount) -> wire.ResponseObject:
        """The whole answer."""
        self._close("incomplete" if reason == "length" else "completed")
        whole = reason in ("stop", "tool_calls")
        response = self._response("completed" if whole else "incomplete")
        if not whole:
            why = wire.IncompleteDetails(reason="content_filter" if reason == "content_filter" else "max_output_tokens")
            response.incomplete_details = why
        response.usage = wire.ResponseUsage(
            input_tokens=self._prompt.total,
            input_tokens_details=wire.InputDetails(text_tokens=self._prompt.text, image_tokens=self._prompt.image),
            output_tokens=completion.total,
            output_tokens_details=wire.OutputDetails(text_tokens=completion.text, image_tokens=completion.image),
            total_tokens=self._prompt.total + completion.total,
        )
        return response

    def _response(self, status: Any) -> wire.ResponseObject:
        request = self._request
        return wire.ResponseObject(
            id=self._metadata.id,
            created_at=self._metadata.created,
            model=self._metadata.model,
            status=status,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            output=self._items,
            temperature=request.temperature,
            top_p=request.top_p,
            text={"format": {"type": "text"}} | request.text.model_dump(exclude_none=True, by_alias=True),
            tool_choice=request.tool_choice
            if isinstance(request.tool_choice, str)
            else request.tool_choice.model_dump(),
            tools=[tool.model_dump() for tool in request.tools],
            parallel_tool_calls=request.parallel_tool_calls,
            metadata=request.metadata,
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return sse.typed_event({"type": kind, "sequence_number": self._number - 1, **fields})

    def _add(self, item: wire.OutputItem) -> bytes:
        self._items.append(item)
        self._open = item
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item.model_dump())

    @property
    def _here(self) -> dict[str, Any]:
        """Where an event of the item under way belongs."""
        return {"output_index": len(self._items) - 1, "item_id": self._items[-1].id}

    def _text(self, text: str) -> list[bytes]:
        events: list[bytes] = []
        if not isinstance(self._open, wire.OutputMessage):
            events += self._close()
            name = f"msg_{self._metadata.id}_{len(self._items)}"
            events.append(self._add(wire.OutputMessage(id=name, status="in_progress", content=[])))
            part = wire.OutputText(text="")
            self._open.content.append(part)  # type: ignore[union-attr]
            events.append(
                self._event("response.content_part.added", **self._here, content_index=0, part=part.model_dump())
            )
        part = self._open.content[0]  # type: ignore[union-attr, assignment]
        part.text += text
        events.append(self._event("response.output_text.delta", **self._here, content_index=0, delta=text, logprobs=[]))
        return events

    def _call(self, delta: ToolCallDelta) -> list[bytes]:
        events: list[bytes] = []
        if delta.id is not None:
            name = f"fc_{self._metadata.id}_{len(self._items)}"
            item = wire.OutputCall(id=name, call_id=delta.id, name=delta.name or "", status="in_progress")
            events += [*self._close(), self._add(item)]
        if delta.arguments:
            self._open.arguments += delta.arguments  # type: ignore[union-attr]
            events.append(self._event("response.function_call_arguments.delta", **self._here, delta=delta.arguments))
        return events

    def _image(self) -> list[bytes]:
        """An image is under way."""
        if isinstance(self._open, wire.OutputImage):
            return []
        self._previews = 0
        name = f"ig_{self._metadata.id}_{len(self._items)}"
        return [
            *self._close(),
            self._add(wire.OutputImage(id=name, status="in_progress")),
            self._event("response.image_generation_call.in_progress", **self._here),
            self._event("response.image_generation_call.generating", **self._here),
        ]

    def _preview(self, png: bytes) -> list[bytes]:
        self._previews += 1
        return [
            self._event(
                "response.image_generation_call.partial_image",
                **self._here,
                partial_image_index=self._previews - 1,
                partial_image_b64=base64.b64encode(png).decode(),
            )
        ]

    def _image_done(self, png: bytes) -> list[bytes]:
        events = self._image()
        self._open.result = base64.b64encode(png).decode()  # type: ignore[union-attr]
        events.append(self._event("response.image_generation_call.completed", **self._here))
        return [*events, *self._close()]

    def _refuse(self, message: str) -> list[bytes]:
        name = f"msg_{self._metadata.id}_{len(self._items)}"
        added = self._add(wire.OutputMessage(id=name, status="in_progress", content=[]))
        self._open.content.append(part := wire.OutputRefusal(refusal=message))  # type: ignore[union-attr]
        return [
            added,
            self._event("response.content_part.added", **self._here, content_index=0, part=part.model_dump()),
            self._event("response.refusal.delta", **self._here, content_index=0, delta=message),
            self._event("response.refusal.done", **self._here, content_index=0, refusal=message),
            *self._close("incomplete"),
        ]

    def _close(self, status: wire.ItemStatus = "completed") -> list[bytes]:
        """The item under way is whole."""
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        events: list[bytes] = []
        if isinstance(item, wire.OutputCall):
            whole = {"name": item.name, "arguments": item.arguments}
            events.append(self._event("response.function_call_arguments.done", **self._here, **whole))
        if isinstance(item, wire.OutputMessage):
            [part] = item.content
            here = {**self._here, "content_index": 0}
            if isinstance(part, wire.OutputText):
                events.append(self._event("response.output_text.done", **here, text=part.text, logprobs=[]))
            events.append(self._event("response.content_part.done", **here, part=part.model_dump()))
        done = self._event("response.output_item.done", output_index=len(self._items) - 1, item=item.model_dump())
        return [*events, done]
