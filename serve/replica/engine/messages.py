"""Messages between a replica and its engine's process, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

from calumma.model.generation import Request
from calumma.serve.protocol import Job
from calumma.serve.replica.engine.client import Part
from calumma.serve.replica.tensor_parallel import Meeting
from calumma.serve.settings import ModelSettings


@dataclass(frozen=True)
class Start:
    """The first word to the engine's process. directory: of the model. meeting: where it meets those that hold the
    model with it."""

    settings: ModelSettings
    directory: str
    threads: int
    meeting: Meeting | None


@dataclass(frozen=True)
class Submit:
    request: Request
    job: Job  # without its prompt


@dataclass(frozen=True)
class Abandon:
    request_id: str


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class News:
    """Parts of answers in order, and the engine's numbers."""

    parts: list[tuple[str, Part]]
    statistics: dict[str, float]


@dataclass(frozen=True)
class Failed:
    """The engine cannot start, or go on."""

    why: str
