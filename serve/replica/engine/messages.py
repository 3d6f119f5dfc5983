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
    """The first message to the engine's process. directory: of the model. threads: of PyTorch. rendezvous: of the
    processes that share the model; None where there is one."""

    settings: ModelSettings
    directory: str
    threads: int
    rendezvous: Rendezvous | None


@dataclass(frozen=True)
class Submit:
    engine_request: Request
    request: GenerationRequest  # without its prompt


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
    """(request id, output) in order, and the engine's statistics."""

    outputs: list[tuple[str, EngineOutput]]
    statistics: dict[str, float]


@dataclass(frozen=True)
class EngineFailed:
    """The engine cannot start, or go on. request_ids: who was in the step that failed; None: that is not known."""

    reason: str
    request_ids: tuple[str, ...] | None = None
