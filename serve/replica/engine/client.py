"""An engine as its replica sees it: requests in, outputs back through a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from calumma.model.generation import Request
from calumma.model.generation.request import Logprob
from calumma.serve.protocol import (
    ENGINE_FAILED,
    UNAVAILABLE,
    Finished,
    GenerationRequest,
    ImageProgress,
    RequestFailed,
    TextDelta,
)
from calumma.serve.replica.processes import EngineLost


@dataclass(frozen=True)
class Admitted:
    """The engine has admitted the request."""


@dataclass(frozen=True)
class ImageCodes:
    """Codes of an image, not decoded yet: all `total` of them, or the first ones for a preview."""

    codes: list[int]
    total: int
    began: float  # time.monotonic() at the image's first token


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens after the first. They follow Admitted."""

    values: list[Logprob]


@dataclass(frozen=True)
class Answered:
    """Further ids of the answer that it can be continued from. They follow the outputs that they gave."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Texts:
    """Texts that came one after the other, as one. count: how many."""

    delta: TextDelta
    count: int


EngineOutput = (
    Admitted | TextDelta | Texts | ImageProgress | ImageCodes | PromptLogprobs | Answered | Finished | RequestFailed
)
NOT_URGENT = (TextDelta, Texts, ImageProgress, Answered)
OnOutput = Callable[[EngineOutput], None]


class EngineClient(Protocol):
    """An engine at work, on a thread of this process or in a process of its own."""

    failure: Exception | None

    @property
    def running(self) -> int:
        """Requests admitted and not finished."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the engine's batch."""
        ...

    def statistics(self) -> dict[str, float]:
        """For metrics and autoscaling, named as in http/metrics.py."""
        ...

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        """Add a request to the engine. on_output is called on any thread: first with Admitted, last with Finished or
        RequestFailed; with RequestFailed alone where the request cannot be answered."""
        ...

    def abort(self, request_id: str) -> None:
        """Stop a request; nothing more is reported of it. One that is not (or no longer) there is fine."""
        ...

    def close(self) -> None:
        """Stop the engine; running requests fail."""
        ...


def engine_ended(failure: Exception | None, in_step: bool = True) -> RequestFailed:
    """What a request gets from an engine that has ended. in_step: it may have been in the last step."""
    if failure is None:
        return RequestFailed(503, "this replica is shutting down; try again", code=UNAVAILABLE)
    if isinstance(failure, EngineLost) or not in_step:
        return RequestFailed(503, f"the engine was lost: {failure}", code=UNAVAILABLE)
    return RequestFailed(500, f"the engine stopped: {failure}", code=ENGINE_FAILED)
