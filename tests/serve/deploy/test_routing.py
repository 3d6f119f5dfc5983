"""Which replica gets a request."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Role, Text
from calumma.model.generation import SamplingParams
from calumma.serve.deploy.routing import MAX_IMBALANCE, PrefixRouter, preferred_replica, prefix_key
from calumma.serve.protocol import (
    GenerationRequest,
)


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
    pending: Any = SimpleNamespace(args=[argument])
    ranks = asyncio.run(router.choose_replicas(replicas, pending))  # type: ignore[arg-type]
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_the_preferred_replica_comes_first_unless_it_is_clearly_busier() -> None:
    asked = request("hello")
    first = preferred_replica(prefix_key(asked), ["a", "b", "c"])
    others = sorted({"a", "b", "c"} - {first})
    assert routed(asked, {"a": 0, "b": 0, "c": 0}) == [[first], others]
    assert routed(asked, {first: MAX_IMBALANCE, others[0]: 0, others[1]: 9})[0] == [first]
    [rank] = routed(asked, {first: MAX_IMBALANCE + 1, others[0]: 0, others[1]: 9})
    assert sorted(rank) == ["a", "b", "c"]


def test_other_calls_go_to_whoever_is_least_busy() -> None:
    [rank] = routed("tokenize this", {"a": 0, "b": 0})
    assert rank == ["a", "b"]
    assert routed(request("x"), {}) == []
