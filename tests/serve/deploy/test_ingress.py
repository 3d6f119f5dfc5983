"""How the ingress reaches replicas: what Ray Serve raises, which version answers, who still has streams; no cluster."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from calumma.model.document import Document, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy import continuation
from calumma.serve.deploy.continuation import ATTEMPTS
from calumma.serve.deploy.ingress import RayBackend
from calumma.serve.protocol import (
    Continuation,
    EventBatch,
    Finished,
    GenerationRequest,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)

REQUEST = GenerationRequest("id", Document((Text("hi", "user"),)), SamplingParams(seed=1))
STARTED, TEXT, FINISHED = Started(TokenCount(3)), TextDelta("seven"), Finished("stop", TokenCount(1))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuation, "REPLICA_GONE_SECONDS", 0.0)


class Handle:
    """A Ray Serve handle whose calls end as they are told: events, and perhaps an exception."""

    def __init__(self, *calls: list[OutputEvent | Exception]) -> None:
        self.calls = list(calls)
        self.requests: list[GenerationRequest] = []
        self.cancelled = 0
        self.generate_batches = self

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, request: GenerationRequest) -> Any:
        self.requests.append(request)
        return Stream(self, list(self.calls.pop(0)))


class Stream:
    def __init__(self, handle: Handle, events: list[OutputEvent | Exception]) -> None:
        self.handle, self.events = handle, events

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> EventBatch:
        if not self.events:
            raise StopAsyncIteration
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return EventBatch([event], (9,), 1) if isinstance(event, TextDelta) else EventBatch([event])

    def cancel(self) -> None:
        self.handle.cancelled += 1


def backend_of(monkeypatch: pytest.MonkeyPatch, **handles: Handle) -> RayBackend:
    monkeypatch.setattr(RayBackend, "_find", lambda self: handles[self.application])
    return RayBackend(next(iter(handles)))


def heard(handle: Handle, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[OutputEvent]:
    backend = backend_of(monkeypatch, app=handle)

    async def listen() -> list[OutputEvent]:
        found = []
        events = backend.generate(REQUEST)
        async for event in events:
            assert backend.streams["app"] == 1
            found.append(event)
            if len(found) == most:
                break
        await events.aclose()
        return found

    found = asyncio.run(listen())
    assert backend.streams["app"] == 0
    return found


LOST = ActorDiedError(), ActorUnavailableError("away", b"x" * 16)


@pytest.mark.parametrize("loss", LOST)
@pytest.mark.parametrize("before", [[], [STARTED], [STARTED, TEXT]])
def test_a_request_whose_replica_is_lost_goes_on_at_another(
    before: list[Any], loss: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = [STARTED, FINISHED] if TEXT in before else [STARTED, TEXT, FINISHED]
    handle = Handle([*before, loss], after)
    assert heard(handle, monkeypatch) == [STARTED, TEXT, FINISHED]
    began = [None, Continuation((), 0), Continuation((9,), 1)]
    assert [request.continuation for request in handle.requests] == [None, began[len(before)]]


def test_nobody_is_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    [last] = heard(Handle(*[[ActorDiedError()] for _ in range(ATTEMPTS)]), monkeypatch)
    assert isinstance(last, RequestFailed)
    assert "ActorDiedError" in last.message


def test_a_full_queue_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    [last] = heard(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]), monkeypatch)
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (429, "overloaded")


def test_an_error_of_the_replicas_own_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RayTaskError("generate_batches", "Traceback …", ValueError("secret"))
    handle = Handle([STARTED, TEXT, error.as_instanceof_cause()])
    *events, last = heard(handle, monkeypatch)
    assert events == [STARTED, TEXT]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (500, "request_failed")
    assert "ValueError" in last.message
    assert "secret" not in last.message
    assert len(handle.requests) == 1


def test_an_answer_that_nobody_wants_any_more_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([STARTED, TEXT, TEXT, FINISHED])
    assert heard(handle, monkeypatch, most=2) == [STARTED, TEXT]
    assert handle.cancelled == 1


def gone() -> Exception:
    return DeploymentUnavailableError(DeploymentID("Engine", "old"))


def test_what_is_begun_stays_with_its_version_and_what_is_not_follows_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = Handle([STARTED, TEXT, ActorDiedError()], [STARTED, FINISHED]), Handle([STARTED, TEXT, FINISHED])
    backend = backend_of(monkeypatch, old=old, new=new)

    async def begun() -> list[OutputEvent]:
        found = []
        async for event in backend.generate(REQUEST):
            if event == TEXT:
                backend.switch("new")
                assert (backend.streams["old"], backend.streams["new"]) == (1, 0)
            found.append(event)
        return found

    assert asyncio.run(begun()) == [STARTED, TEXT, FINISHED]
    assert (len(old.requests), len(new.requests)) == (2, 0)

    old.calls = [[gone()]]
    backend.switch("old")
    original = old.remote

    def remote(request: GenerationRequest) -> Any:
        backend.switch("new")
        return original(request)

    monkeypatch.setattr(old, "remote", remote)

    async def not_begun() -> list[OutputEvent]:
        found = []
        async for event in backend.generate(REQUEST):
            assert (backend.streams["old"], backend.streams["new"]) == (0, 1)
            found.append(event)
        return found

    assert asyncio.run(not_begun()) == [STARTED, TEXT, FINISHED]


def test_an_answer_whose_version_is_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    *events, last = heard(Handle([STARTED, TEXT, ActorDiedError()], [gone()]), monkeypatch)
    assert events == [STARTED, TEXT]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "version_gone")
