"""What passes between the HTTP ingress and an engine replica: one job there, a stream of pieces back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from calumma.model.document import Document
from calumma.model.generation import SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt to answer. `max_tokens` None: as many as the context has room for. `progress`: report drawing."""

    id: str
    prompt: Document
    params: SamplingParams
    max_tokens: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class TokenCount:
    text: int = 0
    image: int = 0

    @property
    def total(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class Started:
    """The prompt was taken in; always the first piece of an accepted job."""

    prompt: TokenCount


@dataclass(frozen=True)
class TextPiece:
    text: str


@dataclass(frozen=True)
class Drawing:
    """An image is under way: `done` of `total` codes."""

    done: int
    total: int


@dataclass(frozen=True)
class ImagePiece:
    png: bytes


@dataclass(frozen=True)
class Finished:
    reason: Literal["stop", "length"]
    answer: TokenCount


@dataclass(frozen=True)
class Refused:
    """The job cannot be done (first piece) or failed half-way (last piece): HTTP status and OpenAI's error fields."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None


Piece = Started | TextPiece | Drawing | ImagePiece | Finished | Refused


class Backend(Protocol):
    """Answers jobs: a Ray Serve handle in production, a replica of this process in tests."""

    def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer as they come. Closing the generator early abandons the job."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Facts about the model (context, image size, parameters, device). Raises when no replica is well."""
        ...
