"""Which replica gets a request."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from calumma.model.document import Document, Image, Role, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy.routing import MAX_IMBALANCE, PrefixRouter, preferred_replica, prefix_key
from calumma.serve.protocol import GenerationRequest


def request(*parts: str | bytes, role: Role = "user") -> GenerationRequest:
    return GenerationRequest(
        "id",
        Document(tuple(Text(p, role) if isinstance(p, str) else Image(p, role=role) for p in parts)),
        SamplingParams(),
    )


def test_prompts_that_begin_alike_have_the_same_key() -> None:
    system = "You are a patient teacher. " * 30
    assert prefix_key(request(system + "one")) == prefix_key(request(system + "two"))
    assert prefix_key(request("short one")) != prefix_key(request("short two"))
    assert prefix_key(request(b"picture", "what is it?")) == prefix_key(request(b"picture", "what is it?"))
    assert prefix_key(request(b"picture", "what is it?")) != prefix_key(request(b"other", "what is it?"))
    salted = replace(request("short one"), salt=b"a")
    assert prefix_key(salted) == prefix_key(replace(request("short one"), salt=b"a"))
    assert len({prefix_key(one) for one in (salted, replace(salted, salt=b"b"), request("short one"))}) == 3
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


def routed(argument: Any, lengths: dict[str, int]) -> list[list[str]]:
    router = PrefixRouter.__new__(PrefixRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda replica: lengths.get(replica.unique_id))
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in lengths]
    pending: Any = SimpleNamespace(args=[argument], routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(router.choose_replicas(replicas, pending))  # type: ignore[arg-type]
    assert pending.routing_context.should_backoff
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_the_preferred_replica_comes_first_unless_it_is_clearly_busier() -> None:
    asked = request("hello")
    first = preferred_replica(prefix_key(asked), ["a", "b", "c"])
    others = sorted({"a", "b", "c"} - {first})
    assert routed(asked, {"a": 0, "b": 0, "c": 0}) == [[first], others]
    assert routed(asked, {first: MAX_IMBALANCE, others[0]: 0, others[1]: 9})[0] == [first]
    [rank] = routed(asked, {first: MAX_IMBALANCE + 1, others[0]: 0, others[1]: 9})
    assert sorted(rank) == ["a", "b", "c"]


def test_a_request_goes_elsewhere_than_to_the_replicas_it_failed_at() -> None:
    first = preferred_replica(prefix_key(request("hello")), ["a", "b", "c"])
    left = sorted({"a", "b", "c"} - {first})
    again = replace(request("hello"), avoid=(first,))
    assert sorted(chain(*routed(again, {"a": 0, "b": 0, "c": 0}))) == left
    assert routed(again, {first: 0}) == [[first]]
    assert routed(again, {first: 0, left[0]: 0}) == [[left[0]]]
    everywhere = replace(again, avoid=("a", "b", "c"))
    assert sorted(chain(*routed(everywhere, {"a": 0, "b": 0, "c": 0}))) == ["a", "b", "c"]


class Replica:
    """A replica as a router sees it; `room` requests at once."""

    node_id, availability_zone, multiplexed_model_ids = "node", None, frozenset[str]()

    def __init__(self, name: str, room: int) -> None:
        self.replica_id, self.max_ongoing_requests = ReplicaID(name, DeploymentID("Engine", "app")), room
        self.requests: list[str] = []

    async def get_queue_len(self, *, deadline_s: float) -> int:
        await asyncio.sleep(0)
        return len(self.requests)


class Patient(PrefixRouter):
    """Ray's default would try for ever, and never let the event loop go on."""

    tries = 0

    async def choose_replicas(self, *args: Any, **options: Any) -> list[list[RunningReplica]]:
        self.tries += 1
        assert self.tries < 1000
        return await super().choose_replicas(*args, **options)


def patient(*replicas: Replica, backoff: float = 1.0) -> Patient:
    router = Patient(
        deployment_id=DeploymentID("Engine", "app"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        initial_backoff_s=backoff,
        max_backoff_s=4 * backoff,
    )
    router.update_replicas(list(replicas))  # type: ignore[arg-type]
    return router


async def route(router: PrefixRouter, text: str, http_request: str) -> Replica:
    """Where a call made for an HTTP request goes, once there is room."""
    metadata = RequestMetadata(request_id=http_request, internal_request_id=http_request, call_method="generate")
    pending = PendingRequest(args=[request(text)], kwargs={}, metadata=metadata)
    replica: Any = await asyncio.wait_for(router._choose_replica_for_request(pending), 60)
    replica.requests.append(text)
    router.on_send_request(replica.replica_id)
    return replica  # type: ignore[no-any-return]


@pytest.mark.parametrize("cold", [True, False])
def test_several_calls_of_one_http_request_are_each_routed_as_others_are(cold: bool) -> None:
    async def main() -> None:
        router = patient(Replica("a", 6), Replica("b", 6))
        if not cold:
            await asyncio.sleep(0.1)  # it asks them how busy they are
        texts = ["one", "one", "one", "two", "three"]
        found = await asyncio.gather(
            *(route(router, text, "the same") for text in texts), route(router, "two", "other")
        )
        assert [one.replica_id.unique_id for one in found] == [
            preferred_replica(prefix_key(request(text)), ["a", "b"]) for text in [*texts, "two"]
        ]
        assert router.curr_num_routing_tasks == 0

    asyncio.run(main())


def test_calls_wait_for_room_without_a_stir_and_the_first_gets_it_first() -> None:
    async def main() -> None:
        replica = Replica("a", 2)
        router = patient(replica, backoff=0.01)
        await asyncio.gather(route(router, "one", "x"), route(router, "two", "x"))
        later = [asyncio.create_task(route(router, text, "x")) for text in ("three", "four")]
        await asyncio.sleep(0.2)
        assert [task.done() for task in later] == [False, False]
        assert router.tries < 100, "between its looks it waits"
        replica.requests.clear()
        await asyncio.gather(*later)
        assert replica.requests == ["three", "four"]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_other_calls_go_to_whoever_is_least_busy() -> None:
    [rank] = routed("tokenize this", {"a": 0, "b": 0})
    assert rank == ["a", "b"]
    assert routed(request("x"), {}) == []
