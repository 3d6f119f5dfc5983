"""What happens to a request whose replica is lost; no cluster."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from calumma.model.document import Document, Image, Role, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy.ingress import ATTEMPTS, RayBackend
from calumma.serve.protocol import (
    Finished,
    GenerationRequest,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)


def job(*parts: str | bytes, role: Role = "user") -> GenerationRequest:
    return GenerationRequest(
        "id",
        Document(tuple(Text(p, role) if isinstance(p, str) else Image(p, role=role) for p in parts)),
        SamplingParams(),
    )


class Handle:
    """A Ray Serve handle whose calls end as they are told: pieces, and perhaps an exception."""

    def __init__(self, *calls: list[OutputEvent | Exception]) -> None:
        self.calls = list(calls)
        self.cancelled = 0
        self.generate_batches = self

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, job_: GenerationRequest) -> Any:
        return Stream(self, self.calls.pop(0))


class Stream:
    def __init__(self, handle: Handle, pieces: list[OutputEvent | Exception]) -> None:
        self.handle, self.pieces = handle, pieces

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[OutputEvent]:
        if not self.pieces:
            raise StopAsyncIteration
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return [piece]

    def cancel(self) -> None:
        self.handle.cancelled += 1


def heard(handle: Handle, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[OutputEvent]:
    monkeypatch.setattr(RayBackend, "_find", lambda self: handle)

    async def listen() -> list[OutputEvent]:
        found = []
        pieces = RayBackend("application").generate(job("hi"))
        async for piece in pieces:
            found.append(piece)
            if len(found) == most:
                break
        await pieces.aclose()
        return found

    return asyncio.run(listen())


def lost() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


STARTED, TEXT, FINISHED = Started(TokenCount(3)), TextDelta("seven"), Finished("stop", TokenCount(1))


@pytest.mark.parametrize("before", [[], [STARTED]])
def test_a_job_whose_replica_dies_before_it_has_said_anything_goes_to_another(
    before: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = Handle([*before, lost()], [STARTED, TEXT, FINISHED])
    assert heard(handle, monkeypatch) == [STARTED, TEXT, FINISHED]


def test_a_replica_that_dies_later_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    *pieces, last = heard(Handle([STARTED, TEXT, lost()], [STARTED]), monkeypatch)
    assert pieces == [STARTED, TEXT]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "unavailable")


def test_nobody_is_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    [last] = heard(Handle(*[[lost()] for _ in range(ATTEMPTS)]), monkeypatch)
    assert isinstance(last, RequestFailed)
    assert "ActorDiedError" in last.message


def test_a_full_queue_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import BackPressureError

    [last] = heard(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]), monkeypatch)
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (429, "overloaded")


def test_an_answer_that_nobody_wants_any_more_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([STARTED, TEXT, TEXT, FINISHED])
    assert heard(handle, monkeypatch, most=2) == [STARTED, TEXT]
    assert handle.cancelled == 1
