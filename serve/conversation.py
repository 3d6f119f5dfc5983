"""From a request on the wire to a prompt (a document with roles) and sampling parameters."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable

from calumma.model.document import Document, Image, Role, Segment, Text, UnreadableImage, without_layout
from calumma.model.generation import PhaseSampling, SamplingParams
from calumma.serve.settings import SamplingDefaults
from calumma.serve.wire import ChatRequest, ImagePart, Message, Sampling, WireError

# Messages of one role that follow each other are one turn; this stands between their texts.
BETWEEN = "\n"


def chat_prompt(request: ChatRequest) -> Document:
    """The conversation so far. System text becomes the head of the user's turn it stands before. Decodes every image.

    Raises WireError that names the message and part.
    """
    segments: list[Segment] = []
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        role: Role = "assistant" if message.role == "assistant" else "user"
        if role == "assistant" and not segments:
            raise WireError("the conversation must begin with a user message", param=f"{where}.role")
        new = _segments(message, role, where)
        if not new:
            raise WireError("the message is empty", param=f"{where}.content")
        if segments and segments[-1].role == role and isinstance(new[0], Text):
            new[0] = Text(BETWEEN + new[0].text, role)
        segments += new
    if request.messages[-1].role != "user":
        raise WireError("the last message must be a user's: it is what gets answered", param="messages")
    return Document(without_layout(_joined(segments)))


def _segments(message: Message, role: Role, where: str) -> list[Segment]:
    segments: list[Segment] = []
    for index, part in enumerate(message.body):
        here = f"{where}.{message.field}[{index}]"
        if isinstance(part, ImagePart):
            if message.role in ("system", "developer"):
                raise WireError(f"a {message.role} message holds text only", param=here)
            segments.append(Image(image_bytes(part.image_url.url, f"{here}.image_url.url"), role=role))
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
    """A document to go on with: no roles. Raises WireError."""
    return Document((Text(well_formed(text, "prompt")),) if text else ())


def drawing_prompt(text: str) -> Document:
    """A user's turn that asks for an image. Raises WireError."""
    return Document((Text(well_formed(text, "prompt"), "user"),))


def well_formed(text: str, param: str) -> str:
    """JSON may carry half a surrogate pair, which is no character. Raises WireError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"the text is not valid Unicode at character {error.start}", param=param) from error
    return text


def image_bytes(url: str, param: str) -> bytes:
    """The encoded image in a base64 data URL, proven to be one by decoding it. Raises WireError."""
    if url.startswith(("http://", "https://")):
        raise WireError(
            "remote images are not fetched; send the image itself as a data URL: data:image/png;base64,…",
            param=param,
            code="remote_image_url",
        )
    header, comma, payload = url.partition(",")
    if not header.startswith("data:") or not comma:
        raise WireError(
            "not a data URL; it must look like data:image/png;base64,…", param=param, code="invalid_image_url"
        )
    if not header.endswith(";base64"):
        raise WireError(f"the data URL must be base64, found {header[:60]!r}", param=param, code="invalid_image_url")
    try:
        data = base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"the data URL is not valid base64: {error}", param=param, code="invalid_base64") from error
    try:
        Image(data).open()
    except UnreadableImage as error:
        raise WireError(f"the image part is {error}", param=param, code="invalid_image") from error
    return data


def sampling_params(request: Sampling, modalities: Collection[str], defaults: SamplingDefaults) -> SamplingParams:
    """["text"]: text, ["image"]: one image, both: text and images in any order. The replica sets `max_tokens`."""

    def value(field: str) -> float:
        given = getattr(request, field)
        return getattr(defaults, field) if given is None else given

    wanted = set(modalities)
    return SamplingParams(
        mode="interleaved" if len(wanted) == 2 else "image" if "image" in wanted else "text",
        max_images=int(value("max_images")),
        text=PhaseSampling(value("temperature"), value("top_p"), value("repetition_penalty")),
        image=PhaseSampling(value("image_temperature"), value("image_top_p")),
        guidance_text=value("guidance_text"),
        guidance_image=value("guidance_image"),
        seed=request.seed,
    )
