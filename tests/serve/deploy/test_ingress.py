"""What happens to a request whose replica is lost, or whose engine fails; no cluster."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from calumma.model.document import Document, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy import ingress
from calumma.serve.deploy.ingress import ATTEMPTS, RayBackend
from calumma.serve.protocol import (
    ENGINE_FAILED,
    Finished,
    GenerationRequest,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)

Step = OutputEvent | Exception


class Handle:
    """A Ray Serve handle. Each call takes the next of the given lists: events, and perhaps an exception."""

    def __init__(self, *calls: list[Step]) -> None:
        self.calls = list(calls)
        self.cancelled = 0
        self.generate_batches = self
        self.requests: list[GenerationRequest] = []

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, request: GenerationRequest) -> Any:
        self.requests.append(request)
        return Stream(self, self.calls.pop(0))


class Stream:
    def __init__(self, handle: Handle, steps: list[Step]) -> None:
        self.handle, self.steps = handle, steps

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[OutputEvent]:
        if not self.steps:
            raise StopAsyncIteration
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return [step]

    def cancel(self) -> None:
        self.handle.cancelled += 1


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "REPLICA_GONE_SECONDS", 0.0)


def output(handle: Handle, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[OutputEvent]:
    """What comes of a request, or its first events."""
    monkeypatch.setattr(RayBackend, "_find", lambda self: handle)

    async def collect() -> list[OutputEvent]:
        found = []
        request = GenerationRequest("id", Document((Text("hi", "user"),)), SamplingParams())
        async with aclosing(RayBackend("application").generate(request)) as events:
            async for event in events:
                found.append(event)
                if len(found) == most:
                    break
        return found

    return asyncio.run(collect())


def lost() -> Exception:
    from ray.exceptions import ActorDiedError

    return ActorDiedError()


ENGINE_LOST = RequestFailed(500, "the engine stopped: out of memory", code=ENGINE_FAILED)
STARTED, TEXT, FINISHED = Started(TokenCount(3)), TextDelta("seven"), Finished("stop", TokenCount(1))


@pytest.mark.parametrize("before", [[], [STARTED]])
def test_a_request_whose_replica_dies_before_there_is_output_goes_to_another(
    before: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = Handle([*before, lost()], [STARTED, TEXT, FINISHED])
    assert output(handle, monkeypatch) == [STARTED, TEXT, FINISHED]


def test_a_replica_that_dies_later_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    *events, last = output(Handle([STARTED, TEXT, lost()], [STARTED]), monkeypatch)
    assert events == [STARTED, TEXT]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "unavailable")


@pytest.mark.parametrize("before", [[], [STARTED]])
def test_a_replica_whose_engine_has_failed_is_left_as_a_lost_one(
    before: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = Handle([*before, ENGINE_LOST], [STARTED, TEXT, FINISHED])
    assert output(handle, monkeypatch) == [STARTED, TEXT, FINISHED]
    assert [request.id for request in handle.requests] == ["id-1", "id-2"], "a replica may still work on the first"


def test_an_engine_that_fails_later_ends_the_answer_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output(Handle([STARTED, TEXT, ENGINE_LOST], [STARTED]), monkeypatch) == [STARTED, TEXT, ENGINE_LOST]


def test_other_refusals_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RequestFailed(400, "the prompt is too long", code="context_length_exceeded")
    assert output(Handle([refused], [STARTED]), monkeypatch) == [refused]


@pytest.mark.parametrize(("step", "says"), [(lost(), "ActorDiedError"), (ENGINE_LOST, "out of memory")])
def test_nobody_is_asked_for_ever(step: Step, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle(*[[STARTED, step] for _ in range(ATTEMPTS)])
    first, last = output(handle, monkeypatch)
    assert first == STARTED
    assert isinstance(last, RequestFailed)
    assert says in last.message
    assert handle.calls == [], "every attempt is made"


def test_a_full_queue_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import BackPressureError

    [last] = output(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]), monkeypatch)
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (429, "overloaded")


def test_an_answer_that_nobody_wants_any_more_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle([STARTED, TEXT, TEXT, FINISHED])
    assert output(handle, monkeypatch, most=2) == [STARTED, TEXT]
    assert handle.cancelled == 1
