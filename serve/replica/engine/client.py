"""An engine as its replica sees it: requests in, outputs back through a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from calumma.model.generation import Request
from calumma.model.generation.request import Logprob
from calumma.serve.protocol import ENGINE_FAILED, Finished, GenerationRequest, ImageProgress, RequestFailed, TextDelta


@dataclass(frozen=True)
class Admitted:
    """The engine has taken the request in."""


@dataclass(frozen=True)
class ImageCodes:
    """Codes of an image, not decoded yet: all of them, or those of a preview."""

    codes: list[int]
    total: int
    began: float  # time.monotonic()


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the prompt's tokens after the first."""

    values: list[Logprob]


EngineOutput = Admitted | TextDelta | ImageProgress | ImageCodes | PromptLogprobs | Finished | RequestFailed
OnOutput = Callable[[EngineOutput], None]


class EngineClient(Protocol):
    """An engine at work, on a thread of this process or in a process of its own."""

    failure: Exception | None

    @property
    def running(self) -> int:
        """Requests in work."""
        ...

    @property
    def waiting(self) -> int:
        """Requests in line for the engine."""
        ...

    def statistics(self) -> dict[str, float]:
        """Numbers for metrics and autoscaling, named as in metrics.py."""
        ...

    def submit(self, request: Request, job: GenerationRequest, post: OnOutput) -> None:
        """Take a request in. `post` is called on any thread: first with Taken, last with Finished or Refused; with
        Refused alone where the request cannot be answered."""
        ...

    def abandon(self, request_id: str) -> None:
        """Stop working on a request. One that is not (or no longer) there is fine."""
        ...

    def close(self) -> None:
        """End; running requests are refused."""
        ...


def engine_ended(failure: Exception | None) -> RequestFailed:
    """Why an engine that has ended answers nothing."""
    if failure is not None:
        return RequestFailed(500, f"the engine stopped: {failure}", code=ENGINE_FAILED)
    return RequestFailed(503, "this replica is shutting down; try again", code="unavailable")
