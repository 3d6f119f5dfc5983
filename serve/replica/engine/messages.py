"""Messages between a replica and its engine's process, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

from calumma.model.generation import Request
from calumma.serve.protocol import GenerationRequest
from calumma.serve.replica.engine.client import EngineOutput
from calumma.serve.replica.tensor_parallel import Rendezvous
from calumma.serve.settings import ModelSettings


@dataclass(frozen=True)
class Start:
    """The first word to the engine's process. directory: of the model. meeting: where it meets those that hold the
    model with it."""

    settings: ModelSettings
    directory: str
    threads: int
    meeting: Rendezvous | None


@dataclass(frozen=True)
class Submit:
    request: Request
    job: GenerationRequest  # without its prompt


@dataclass(frozen=True)
class Abort:
    request_id: str


@dataclass(frozen=True)
class Close:
    pass


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Outputs:
    """Parts of answers in order, and the engine's numbers."""

    parts: list[tuple[str, EngineOutput]]
    statistics: dict[str, float]


@dataclass(frozen=True)
class EngineFailed:
    """The engine cannot start, or go on."""

    why: str
