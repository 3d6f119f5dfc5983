"""What passes between the HTTP ingress and an engine replica: a request there, a stream of output events back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from calumma.model.document import Document
from calumma.model.generation import SamplingParams

# How the special ids are spelled towards clients that need a name for them (lm-evaluation-harness).
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Continuation:
    """How far an answer is. tokens: ids it begins with, which are not drawn again. events: so many of those that the
    whole answer gives have been sent, and are not sent again; they may stand for more tokens than `tokens`, or fewer.
    """

    tokens: tuple[int, ...] = ()
    events: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """One generation: a prompt, which is a document, or token ids as a client of /v1/completions gives them.

    max_tokens: None is as many as the context has room for; 0 generates nothing: the prompt is counted and scored.
    stop: the text ends before the first of these strings that occurs in it.
    logprobs: log-probabilities of text tokens with so many alternatives each; None is none.
    progress: how far an image is, from time to time. previews: so many decoded previews of each unfinished image.
    begin_with_image: the output's first part is an image. echo: Started brings the prompt's text.
    continuation: another replica has begun the answer, and this one goes on with it.
    bad_words: texts that the output's text does not get.
    salt: opaque; what a replica keeps of prompts and answers is found by requests of the same salt alone.
    tenant: whose the request is: tenants share the replicas evenly. priority: lower ones go first.
    grammar_param: the HTTP request's field that holds the grammar.
    avoid: replicas that it does not go to while there are others: it was at them when they failed.
    adapter: the name of the model's adapter that answers; "" is the model itself.
    """

    id: str
    prompt: Document | tuple[int, ...]
    params: SamplingParams
    max_tokens: int | None = None
    progress: bool = False
    previews: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    begin_with_image: bool = False
    echo: bool = False
    continuation: Continuation | None = None
    bad_words: tuple[str, ...] = ()
    salt: bytes = b""
    tenant: str = ""
    priority: int = 0
    grammar_param: str | None = None
    avoid: tuple[str, ...] = ()
    adapter: str = ""

    @property
    def param(self) -> str:
        """The HTTP request's field that holds the prompt."""
        return "messages" if isinstance(self.prompt, Document) and self.prompt.is_conversation else "prompt"


@dataclass(frozen=True)
class TokenCount:
    text: int = 0
    image: int = 0

    @property
    def total(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class Token:
    """A token of a text: its id, its bytes (none for special ids), where in the text it begins, its log-probability
    (None where nothing precedes it) and the most likely alternatives (id, bytes, log-probability), itself included."""

    id: int
    surface: bytes
    begin: int
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More text. tokens: those that end in it, where log-probabilities were asked for."""

    text: str
    tokens: tuple[Token, ...] = ()

    def __add__(self, more: TextDelta) -> TextDelta:
        return TextDelta(self.text + more.text, self.tokens + more.tokens)


@dataclass(frozen=True)
class Started:
    """The engine has admitted the request; always the first event of one that is answered. prompt: its tokens."""

    prompt: TokenCount
    echo: TextDelta | None = None


@dataclass(frozen=True)
class ImageProgress:
    """An image is under way: `done` of `total` codes. preview: a PNG file of what is there."""

    done: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True)
class ImageOutput:
    """A finished image as a PNG file. seconds: from its first token to its last pixel."""

    png: bytes
    seconds: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The output is whole; always the last event. completion: its tokens."""

    reason: Literal["stop", "length"]
    completion: TokenCount


@dataclass(frozen=True)
class ContentFiltered:
    """The safety policy ends the output, perhaps before it began; always the last event. message: for the client."""

    message: str
    completion: TokenCount = TokenCount()


@dataclass(frozen=True)
class RequestFailed:
    """The request is not answered (first event) or failed half-way (last event): HTTP status, OpenAI's error fields.

    With UNAVAILABLE from a replica the request has no part in it, and another replica can go on with it. All else is
    final: it would fail anywhere, or, having been in a step that failed, might do to the next replica what it did to
    this one.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None


OutputEvent = Started | TextDelta | ImageProgress | ImageOutput | Finished | ContentFiltered | RequestFailed
OutputStream = AsyncGenerator[OutputEvent, None]
FINAL_EVENTS = (Finished, ContentFiltered, RequestFailed)
# Values of RequestFailed.code
ENGINE_FAILED, REQUEST_FAILED, UNAVAILABLE, OVERLOADED = "engine_failed", "request_failed", "unavailable", "overloaded"
OUT_OF_MEMORY = "out_of_memory"


@dataclass(frozen=True)
class EventBatch:
    """Events that a replica sends together. tokens: further ids that the answer can be continued from; together with
    those of the batches before, they are its beginning. count: events that these were merged from, neither Started nor
    a last one among them. replica: who sends it, told with an output's first batch.
    """

    events: list[OutputEvent]
    tokens: tuple[int, ...] = ()
    count: int = 0
    replica: str | None = None


class Backend(Protocol):
    """Generates: engine replicas behind a Ray Serve handle, or a replica in this process."""

    def generate(self, request: GenerationRequest) -> OutputStream:
        """The output as it comes. Closing the generator early aborts the request."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Facts about the model (context, image size, parameters, device). Raises when no replica is well."""
        ...

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Numbers of every replica's engine, by the replica's name."""
        ...

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text alone."""
        ...

    async def detokenize(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...
