"""OpenAI's Responses API as types: requests, and the items an answer is made of.

An answer's texts are messages, its images `image_generation_call` items; their order is that of text and images. Calls
of functions are `function_call` items, the last of it.
Reference: platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from calumma.serve.http.wire.constraints import NamedSchema, ResponseFormat
from calumma.serve.http.wire.content import ImagePart, ImageURL, RequestModel, TextPart, WireModel, data_url_of
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import ChatRequest, Message, Modality, SamplingFields
from calumma.serve.http.wire.responses_input import (
    FunctionCall,
    FunctionOutput,
    ImageCall,
    InputImage,
    InputItem,
    InputMessage,
    InputRefusal,
    InputText,
    as_items,
)
from calumma.serve.http.wire.tools import (
    CalledFunction,
    ChatTool,
    FunctionDefinition,
    FunctionName,
    NamedTool,
    SentCall,
    ToolMode,
)

MESSAGES = "messages"  # the field of a chat that the input becomes


class TextFormat(NamedSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextSettings(RequestModel):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ImageTool(RequestModel):
    """The one tool of the server's own. Whether an answer holds images is for `modalities` to say, so it need not be
    given."""

    type: Literal["image_generation"]
    partial_images: int = Field(0, ge=0, le=8)


class ImageToolChoice(RequestModel):
    type: Literal["image_generation"]


class FunctionTool(FunctionDefinition):
    type: Literal["function"]


class FunctionChoice(FunctionName):
    type: Literal["function"]


ResponseTool = Annotated[ImageTool | FunctionTool, Field(discriminator="type")]


class ResponsesRequest(SamplingFields):
    """Nothing is kept: `previous_response_id` is refused, send the conversation."""

    input: Annotated[
        list[InputItem], Field(min_length=1), BeforeValidator(as_items, json_schema_input_type=str | list[InputItem])
    ] = Field(description="a text, or the conversation so far: messages, and images of earlier answers")
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1, description="of the answer, image codes among them")
    stream: bool = Field(False, description="answer in server-sent events")
    text: TextSettings = Field(TextSettings(), description="`format`: what the text must be, as JSON of a schema")
    tools: list[ResponseTool] = Field(
        [],
        description="functions that the answer may call; `image_generation`, though the model draws without it, too",
    )
    tool_choice: ToolMode | Annotated[ImageToolChoice | FunctionChoice, Field(discriminator="type")] = Field(
        "auto",
        description="`required`, or a function: the answer is calls, or one of it; `image_generation`: an image stands "
        "first",
    )
    parallel_tool_calls: bool = Field(True, description="one answer may hold several calls")
    modalities: list[Modality] = Field(["text", "image"], min_length=1, description="what the answer may hold")
    background: Literal[False] = Field(False, description="answers are not kept")
    metadata: dict[str, str] = Field({}, description="comes back with the answer")

    @model_validator(mode="before")
    @classmethod
    def _no_template(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("prompt") is not None:
            raise APIError("this server keeps no prompts; send `input`", param="prompt", code="unsupported")
        return values

    @model_validator(mode="before")
    @classmethod
    def _known_tools(cls, values: Any) -> Any:
        tools = values.get("tools") if isinstance(values, dict) else None
        for index, tool in enumerate(tools if isinstance(tools, list) else ()):
            if isinstance(tool, dict) and tool.get("type") not in ("image_generation", "function"):
                raise APIError(
                    f"this server has no tools of type {str(tool.get('type'))[:40]!r}; leave it out",
                    param=f"tools[{index}]",
                    code="unsupported",
                )
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            json.dumps(self.model_dump(), ensure_ascii=False, allow_nan=False).encode()  # much of it is sent back
            self.chat()
        except ValueError as error:
            raise APIError(f"the request cannot be written as JSON: {error}", code="invalid_value") from error
        except APIError as error:
            raise renamed(error, self) from None
        return self

    @property
    def previews(self) -> int:
        return max((tool.partial_images for tool in self.tools if isinstance(tool, ImageTool)), default=0)

    @property
    def functions(self) -> list[tuple[int, FunctionTool]]:
        """By their place among the tools."""
        return [(number, tool) for number, tool in enumerate(self.tools) if isinstance(tool, FunctionTool)]

    @property
    def _chat_choice(self) -> ToolMode | NamedTool:
        if isinstance(self.tool_choice, FunctionChoice):
            return NamedTool(type="function", function=FunctionName(name=self.tool_choice.name))
        return "auto" if isinstance(self.tool_choice, ImageToolChoice) else self.tool_choice

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises APIError."""
        given = self.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        form = self.text.format
        return ChatRequest(
            messages=self._messages(),
            modalities=self.modalities,
            max_tokens=self.max_output_tokens,
            stream=self.stream,
            begin_with="image" if isinstance(self.tool_choice, ImageToolChoice) else None,
            response_format=None if form is None else _chat_format(form),
            tools=[
                ChatTool(type="function", function=FunctionDefinition(**tool.model_dump(exclude={"type"})))
                for _, tool in self.functions
            ],
            tool_choice=self._chat_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            **given,
        )

    def _messages(self) -> list[Message]:
        messages = [] if self.instructions is None else [_message("system", [TextPart(text=self.instructions)])]
        for index, item in enumerate(self.input):
            if isinstance(item, InputMessage):
                where = f"input[{index}].content"
                parts = [_part(part, f"{where}[{number}]") for number, part in enumerate(item.content or ())]
                messages.append(_message(item.role, parts))
            elif isinstance(item, ImageCall) and item.result:
                messages.append(_message("assistant", [_image(data_url_of("png", item.result))]))
            elif isinstance(item, FunctionCall):
                called = SentCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                messages.append(Message(role="assistant", tool_calls=[called]))
            elif isinstance(item, FunctionOutput):
                where = f"input[{index}].output"
                parts = [_part(part, f"{where}[{number}]") for number, part in enumerate(item.output or ())]
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=list(parts)))
            else:
                messages.append(_message("system", []))
        return messages


# Fields of the chat that an input becomes -> what they are called here.
NAMES = {"response_format": "text.format", "begin_with": "tool_choice", "max_tokens": "max_output_tokens"}


def renamed(error: APIError, request: ResponsesRequest) -> APIError:
    """An error of the chat, naming the field as the Responses API calls it."""
    param = error.body["error"]["param"]
    if param is None:
        return error
    if param.startswith(MESSAGES):
        named = _of_message(param, request)
    elif param.startswith("tools["):
        number, _, rest = param.removeprefix("tools[").partition("]")
        named = f"tools[{request.functions[int(number)][0]}]{rest.removeprefix('.function')}"
    else:
        named = NAMES.get(param.partition(".")[0], param)
    error.body["error"]["param"] = named
    return error


def _of_message(param: str, request: ResponsesRequest) -> str:
    number, bracket, rest = param.removeprefix(MESSAGES).removeprefix("[").partition("]")
    if not bracket:
        return "input"
    index = int(number) - (request.instructions is not None)
    if index < 0:
        return "instructions"
    item = request.input[index]
    if isinstance(item, ImageCall):
        rest = ".result"
    elif isinstance(item, FunctionOutput):
        rest = rest.replace("content", "output").replace("tool_call_id", "call_id")
    elif isinstance(item, FunctionCall):
        rest = ""
    return f"input[{index}]{rest.removesuffix('.url')}"


def _message(role: Any, parts: list[TextPart | ImagePart]) -> Message:
    return Message(role=role, content=list(parts))


def _part(part: InputText | InputImage | InputRefusal, where: str) -> TextPart | ImagePart:
    if isinstance(part, InputImage):
        if part.image_url is None:
            raise APIError(
                "send the image itself, as a data URL; files are not looked up", param=where, code="unsupported"
            )
        return _image(part.image_url)
    return TextPart(text=part.refusal if isinstance(part, InputRefusal) else part.text)


def _image(url: str) -> ImagePart:
    return ImagePart(image_url=ImageURL(url=url))


def _chat_format(form: TextFormat) -> ResponseFormat:
    schema = NamedSchema(name=form.name, schema=form.schema_) if form.type == "json_schema" else None
    return ResponseFormat(type=form.type, json_schema=schema)


# ---- answers


class OutputText(WireModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field([])
    logprobs: list[Any] = Field([])


class OutputRefusal(WireModel):
    type: Literal["refusal"] = "refusal"
    refusal: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(WireModel):
    type: Literal["message"] = "message"
    id: str
    status: ItemStatus = "completed"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText | OutputRefusal]


class OutputImage(WireModel):
    type: Literal["image_generation_call"] = "image_generation_call"
    id: str
    status: ItemStatus = "completed"
    result: str | None = None
    output_format: Literal["png"] = "png"


class OutputCall(WireModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: ItemStatus = "completed"


OutputItem = OutputMessage | OutputImage | OutputCall


class InputDetails(WireModel):
    cached_tokens: int = 0
    text_tokens: int
    image_tokens: int


class OutputDetails(WireModel):
    reasoning_tokens: int = 0
    text_tokens: int
    image_tokens: int


class ResponseUsage(WireModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(WireModel):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseObject(WireModel):
    """The answer. `output_text` is for clients to put together."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    truncation: Literal["disabled"] = "disabled"
    metadata: dict[str, str]
    usage: ResponseUsage | None = None
