"""From a request on the wire to a prompt (a document with roles) and sampling parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from calumma.model.document import Document, Image, Role, Segment, Text, without_layout
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.model.generation.request import RANDOM_SEED, nth_seed
from calumma.model.tokenizers.tool_calls import call_text, response_text, tools_text, without_marks
from calumma.serve.http.image_loader import ImageSource, LoadedImages
from calumma.serve.http.wire.content import ImagePart, TextPart
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import ChatRequest, Message, SamplingFields, TextFields
from calumma.serve.protocol import GenerationRequest
from calumma.serve.settings import SamplingDefaults

# Messages of one role that follow each other are one turn; this stands between their texts.
SEPARATOR = "\n"


def image_sources(request: ChatRequest) -> list[ImageSource]:
    """The images of a conversation, in order."""
    return [
        ImageSource(
            part.image_url.url,
            f"messages[{index}].{message.field}[{number}].image_url.url",
            "crop" if message.role == "assistant" else "pad",
        )
        for index, message in enumerate(request.messages)
        for number, part in enumerate(message.body)
        if isinstance(part, ImagePart)
    ]


def chat_prompt(request: ChatRequest, images: LoadedImages) -> Document:
    """The conversation so far. System text becomes the head of the user's turn it stands before. Turns alternate: an
    empty answer, as clients send it back after one that was only an image, keeps its place, and before an answer that
    stands first there is an empty question. Tools that may be called are told first of all. images:
    those of `image_sources`.

    Raises APIError that names the message and part.
    """
    turns: list[tuple[Role, list[Segment]]] = []
    marked = _Marked(request)
    for index, message in enumerate(request.messages):
        role: Role = "assistant" if message.role == "assistant" else "user"
        new = _segments(message, role, f"messages[{index}]", images, marked)
        if not turns and role == "assistant":
            turns.append(("user", []))
        if not turns or turns[-1][0] != role:
            turns.append((role, new))
            continue
        said = turns[-1][1]
        if said and new and isinstance(new[0], Text):
            new[0] = Text(SEPARATOR + new[0].text, role)
        said += new
    while turns and turns[-1] == ("assistant", []):  # it is where the answer is to begin
        turns.pop()
    if not turns or not turns[-1][1]:
        raise APIError("the message is empty", param=f"messages[{len(request.messages) - 1}].content")
    if turns[-1][0] != "user":
        raise APIError("the last message must be a user's: it is what gets answered", param="messages")
    if request.offered:
        told = tools_text(function.tool for function in request.offered)
        turns[0][1].insert(0, Text(well_formed(told, "tools") + (SEPARATOR if turns[0][1] else ""), "user"))
    return Document(tuple(segment for role, said in turns for segment in _turn(role, said)))


def _turn(role: Role, said: list[Segment]) -> tuple[Segment, ...]:
    return without_layout(_joined(said)) or (Text("", role),)


class _Marked:
    """Calls and what they returned as text, where a conversation has tools."""

    def __init__(self, request: ChatRequest) -> None:
        self._tools = bool(request.offered) or any(
            message.tool_calls or message.role == "tool" for message in request.messages
        )
        self._names: dict[str, str] = {}  # of the calls so far, by id

    def text(self, said: str) -> str:
        return without_marks(said) if self._tools else said

    def calls(self, message: Message) -> str:
        if message.role != "assistant":
            return ""
        self._names |= {call.id: call.function.name for call in message.tool_calls}
        return "".join(call_text(call.function.name, call.function.arguments) for call in message.tool_calls)

    def response(self, message: Message, where: str) -> str:
        """Raises APIError."""
        name = self._names.get(message.tool_call_id or "")
        if name is None:
            raise APIError(
                f"it is the result of {message.tool_call_id!r}, and no assistant's message before it has a call "
                "with this id",
                param=f"{where}.tool_call_id",
                code="invalid_value",
            )
        return response_text(name, "".join(part.text for part in message.body if isinstance(part, TextPart)))


def _segments(message: Message, role: Role, where: str, images: LoadedImages, marked: _Marked) -> list[Segment]:
    segments: list[Segment] = []
    if message.role == "tool":
        segments.append(Text(well_formed(marked.response(message, where), f"{where}.content"), role))
    for index, part in enumerate(message.body):
        here = f"{where}.{message.field}[{index}]"
        if isinstance(part, ImagePart):
            if message.role in ("system", "developer"):
                raise APIError(f"a {message.role} message holds text only", param=here)
            segments.append(Image(images[f"{here}.image_url.url"], role=role))
        elif part.text and message.role != "tool":
            segments.append(Text(marked.text(well_formed(part.text, f"{here}.text")), role))
    if calls := marked.calls(message):
        segments.append(Text(well_formed(calls, f"{where}.tool_calls"), role))
    return segments


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Adjacent texts of one role as one, so that a text split over parts encodes as it would in one piece."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if isinstance(segment, Text) and isinstance(last, Text) and last.role == segment.role:
            joined[-1] = Text(last.text + segment.text, segment.role)
        else:
            joined.append(segment)
    return joined


def plain_prompt(text: str) -> Document:
    """A document to continue: no roles. Raises APIError."""
    return Document((Text(well_formed(text, "prompt")),) if text else ())


def image_prompt(text: str) -> Document:
    """A user's turn that asks for an image. Raises APIError."""
    return Document((Text(well_formed(text, "prompt"), "user"),))


def well_formed(text: str, param: str) -> str:
    """JSON may carry half a surrogate pair, which is no character. Raises APIError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise APIError(f"the text is not valid Unicode at character {error.start}", param=param) from error
    return text


def sampling_params(request: SamplingFields, modalities: Collection[str], defaults: SamplingDefaults) -> SamplingParams:
    """["text"]: text, ["image"]: one image, both: text and images in any order. The replica sets `max_tokens`, and
    what needs its tokenizer."""

    def value(field: str) -> float:
        given = getattr(request, field)
        return getattr(defaults, field) if given is None else given

    begin, end = value("guidance_begin"), value("guidance_end")
    if begin > end:
        raise APIError(f"guidance_begin {begin:g} is after guidance_end {end:g}", param="guidance_begin")
    wanted = set(modalities)
    text = request if isinstance(request, TextFields) else TextFields()
    return SamplingParams(
        mode="interleaved" if len(wanted) == 2 else "image" if "image" in wanted else "text",
        max_images=int(value("max_images")),
        text=PhaseSampling(
            value("temperature"),
            value("top_p"),
            value("repetition_penalty"),
            int(value("top_k")),
            value("min_p"),
            text.presence_penalty,
            text.frequency_penalty,
        ),
        image=PhaseSampling(
            value("image_temperature"),
            value("image_top_p"),
            top_k=int(value("image_top_k")),
            min_p=value("image_min_p"),
        ),
        guidance_text=value("guidance_text"),
        guidance_image=value("guidance_image"),
        guidance_begin=begin,
        guidance_end=end,
        guidance_schedule=request.guidance_schedule or defaults.guidance_schedule,
        seed=None if request.seed == RANDOM_SEED else request.seed,
        stop_ids=text.stop_token_ids,
        min_tokens=text.min_tokens,
        ignore_eos=text.ignore_eos,
        allowed_ids=text.allowed_token_ids,
        logit_bias=tuple(text.logit_bias.items()),
        constraint=text.constraint,
    )


def expand_choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests of equal prompts, each with an id of its own and, where there is a seed, the next one of 64 bits."""
    return [
        replace(request, id=f"{request.id}-{k}", params=replace(request.params, seed=nth_seed(request.params.seed, k)))
        for k in range(n)
    ]
