"""From a request on the wire to a prompt (a document with roles) and sampling parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from calumma.model.document import Document, Image, Role, Segment, Text, without_layout
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.http.image_loader import ImageLoader
from calumma.serve.http.wire.content import ImagePart
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.requests import ChatRequest, Message, SamplingFields
from calumma.serve.protocol import GenerationRequest
from calumma.serve.settings import Limits, RemoteImages, SamplingDefaults

# Messages of one role that follow each other are one turn; this stands between their texts.
SEPARATOR = "\n"
DATA_URLS_ONLY = ImageLoader(Limits(), RemoteImages())


def chat_prompt(request: ChatRequest, loader: ImageLoader = DATA_URLS_ONLY) -> Document:
    """The conversation so far. System text becomes the head of the user's turn it stands before. Decodes every image.

    Blocks when images are fetched. Raises APIError that names the message and part.
    """
    segments: list[Segment] = []
    number = sum(isinstance(part, ImagePart) for message in request.messages for part in message.body)
    loader.require_count(number, "messages")
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        role: Role = "assistant" if message.role == "assistant" else "user"
        if role == "assistant" and not segments:
            raise APIError("the conversation must begin with a user message", param=f"{where}.role")
        new = _segments(message, role, where, loader)
        if not new:
            raise APIError("the message is empty", param=f"{where}.content")
        if segments and segments[-1].role == role and isinstance(new[0], Text):
            new[0] = Text(SEPARATOR + new[0].text, role)
        segments += new
    if request.messages[-1].role != "user":
        raise APIError("the last message must be a user's: it is what gets answered", param="messages")
    return Document(without_layout(_joined(segments)))


def _segments(message: Message, role: Role, where: str, loader: ImageLoader) -> list[Segment]:
    segments: list[Segment] = []
    for index, part in enumerate(message.body):
        here = f"{where}.{message.field}[{index}]"
        if isinstance(part, ImagePart):
            if message.role in ("system", "developer"):
                raise APIError(f"a {message.role} message holds text only", param=here)
            segments.append(Image(loader.read(part.image_url.url, f"{here}.image_url.url"), role=role))
        elif part.text:
            segments.append(Text(well_formed(part.text, f"{here}.text"), role))
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
    what needs its token ids."""

    def value(field: str) -> float:
        given = getattr(request, field)
        return getattr(defaults, field) if given is None else given

    wanted = set(modalities)
    return SamplingParams(
        mode="interleaved" if len(wanted) == 2 else "image" if "image" in wanted else "text",
        max_images=int(value("max_images")),
        text=PhaseSampling(
            value("temperature"), value("top_p"), value("repetition_penalty"), int(value("top_k")), value("min_p")
        ),
        image=PhaseSampling(
            value("image_temperature"),
            value("image_top_p"),
            top_k=int(value("image_top_k")),
            min_p=value("image_min_p"),
        ),
        guidance_text=value("guidance_text"),
        guidance_image=value("guidance_image"),
        seed=request.seed,
    )


def expand_choices(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """`n` requests of equal prompts, each with an id of its own and, where there is a seed, the next one."""
    choices = [replace(request, id=f"{request.id}-{k}") for k in range(n)]
    seed = request.params.seed
    if seed is None:
        return choices
    return [replace(one, params=replace(one.params, seed=seed + k)) for k, one in enumerate(choices)]
