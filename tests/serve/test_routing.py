"""Which replica gets a request, how many there are, what happens when one dies or a version follows; no cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Role, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy.applications import ModelApplication
from calumma.serve.deploy.ingress import ATTEMPTS, RayBackend
from calumma.serve.deploy.rollout import RolloutController
from calumma.serve.deploy.routing import MAX_IMBALANCE, PrefixRouter, preferred_replica, prefix_key
from calumma.serve.deploy.scaling import QueuedTokensPolicy
from calumma.serve.protocol import (
    Finished,
    GenerationRequest,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.settings import ModelSettings

# ---- routing


def job(*parts: str | bytes, role: Role = "user") -> GenerationRequest:
    return GenerationRequest(
        "id",
        Document(tuple(Text(p, role) if isinstance(p, str) else Image(p, role=role) for p in parts)),
        SamplingParams(),
    )


def test_prompts_that_begin_alike_have_the_same_key() -> None:
    system = "You are a patient teacher. " * 30
    assert prefix_key(job(system + "one")) == prefix_key(job(system + "two"))
    assert prefix_key(job("short one")) != prefix_key(job("short two"))
    assert prefix_key(job(b"picture", "what is it?")) == prefix_key(job(b"picture", "what is it?"))
    assert prefix_key(job(b"picture", "what is it?")) != prefix_key(job(b"other", "what is it?"))
    ids = tuple(range(1000))
    assert prefix_key(GenerationRequest("", ids, SamplingParams())) == prefix_key(
        GenerationRequest("", (*ids, 7), SamplingParams())
    )


@given(st.sets(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=8), st.binary(max_size=8))
def test_a_replica_that_goes_moves_only_its_own_keys(names: set[str], key: bytes) -> None:
    chosen = preferred_replica(key, sorted(names))
    for gone in names:
        left = preferred_replica(key, sorted(names - {gone}))
        assert left == chosen or gone == chosen


def test_keys_spread_over_the_replicas() -> None:
    names = ["a", "b", "c", "d"]
    counts = [sum(preferred_replica(str(k).encode(), names) == name for k in range(400)) for name in names]
    assert min(counts) > 60


def routed(job_: Any, lengths: dict[str, int]) -> list[list[str]]:
    router = PrefixRouter.__new__(PrefixRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: lengths.get(replica.unique_id))
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in lengths]
    pending: Any = SimpleNamespace(args=[job_])
    ranks = asyncio.run(router.choose_replicas(replicas, pending))  # type: ignore[arg-type]
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_the_preferred_replica_comes_first_unless_it_is_clearly_busier() -> None:
    asked = job("hello")
    first = preferred_replica(prefix_key(asked), ["a", "b", "c"])
    others = sorted({"a", "b", "c"} - {first})
    assert routed(asked, {"a": 0, "b": 0, "c": 0}) == [[first], others]
    assert routed(asked, {first: MAX_IMBALANCE, others[0]: 0, others[1]: 9})[0] == [first]
    [rank] = routed(asked, {first: MAX_IMBALANCE + 1, others[0]: 0, others[1]: 9})
    assert sorted(rank) == ["a", "b", "c"]


def test_other_calls_go_to_whoever_is_least_busy() -> None:
    [rank] = routed("tokenize this", {"a": 0, "b": 0})
    assert rank == ["a", "b"]
    assert routed(job("x"), {}) == []


# ---- scaling


@pytest.mark.parametrize(
    ("requests", "queued", "wanted"),
    [(0, {}, 0), (10, {}, 2), (1, {"a": 3000.0, "b": 1000.0}, 4), (10, {"a": 500.0}, 2)],
)
def test_replicas_follow_requests_and_the_prompts_in_line(
    requests: float, queued: dict[str, float], wanted: float
) -> None:
    context: Any = SimpleNamespace(total_num_requests=requests, aggregated_metrics={"queued_tokens": queued})
    assert QueuedTokensPolicy(requests_per_replica=5, tokens_per_replica=1000)(context) == (wanted, {})
    without: Any = SimpleNamespace(total_num_requests=requests, aggregated_metrics=None)
    assert QueuedTokensPolicy(5, 1000)(without) == (requests / 5, {})


# ---- replicas that die


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


# ---- versions


class Registry:
    """What the watcher works with, and what it did."""

    def __init__(self, *models: str) -> None:
        self.sources = dict.fromkeys(models, "1")
        self.did: list[Any] = []
        self.broken = False
        self.rollouts = RolloutController(
            tuple(
                ModelSettings(model=model, name=model.removeprefix("models:/").partition("@")[0]) for model in models
            ),
            {name: ModelApplication(f"{name}-1", "1") for name in ("a", "b")},
            locate=lambda model: self.sources[model.model],
            start=self.place,
            announce=lambda table: self.did.append(("announce", dict(table))),
            remove=lambda application: self.did.append(("remove", application)),
            settle=0,
        )

    def place(self, model: ModelSettings, source: str) -> ModelApplication:
        if self.broken:
            raise RuntimeError("out of memory")
        self.did.append(("place", model.name, source))
        return ModelApplication(f"{model.name}-{source}", source)


def test_a_new_version_is_up_before_it_is_told_and_the_old_one_ends_last() -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    assert registry.rollouts.reconcile() == []
    registry.sources["models:/b@live"] = "2"
    assert registry.rollouts.reconcile() == ["b"]
    assert registry.did == [("place", "b", "2"), ("announce", {"a": "a-1", "b": "b-2"}), ("remove", "b-1")]
    assert registry.rollouts.reconcile() == []


def test_an_ingress_that_did_not_hear_of_a_new_version_is_told_again() -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    told = registry.rollouts.announce
    failures = iter([ConnectionError("gone")])

    def announce(table: dict[str, str]) -> None:
        for failure in failures:
            raise failure
        told(table)

    registry.rollouts.announce = announce
    registry.sources["models:/b@live"] = "2"
    assert registry.rollouts.reconcile() == ["b"]
    assert registry.did[1:] == [("announce", {"a": "a-1", "b": "b-2"}), ("remove", "b-1")]


def test_a_version_that_does_not_come_up_changes_nothing_and_is_tried_again() -> None:
    registry = Registry("models:/a@live")
    registry.sources["models:/a@live"], registry.broken = "2", True
    assert registry.rollouts.reconcile() == []
    assert registry.did == []
    registry.broken = False
    assert registry.rollouts.reconcile() == ["a"]


def test_a_registry_that_does_not_answer_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("models:/a@live", "models:/b@live")
    registry.sources["models:/b@live"] = "2"
    del registry.sources["models:/a@live"]
    assert registry.rollouts.reconcile() == ["b"]


@pytest.mark.parametrize("model", ["/folder/a", "s3://bucket/a", "models:/a/3"])
def test_what_is_no_alias_is_not_followed(model: str) -> None:
    registry = Registry("models:/b@live")
    registry.rollouts.models = (ModelSettings(model=model, name="a"),)
    assert registry.rollouts.reconcile() == []
