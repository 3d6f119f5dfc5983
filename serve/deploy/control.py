"""What replicas are asked beside all requests: facts and statistics.

A call through a Ray Serve handle takes one of the replica's request slots, and waits for one where the replica is full.
Ray Serve itself asks a replica's actor for its routing statistics whatever the replica is busy with; so does this.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

NAMESPACE = "serve"  # of Ray Serve's actors
ANSWER_SECONDS = 2.0  # replicas that take longer are left out


class Report(TypedDict):
    """What a replica tells. Ray Serve wants a dictionary."""

    facts: dict[str, Any]
    statistics: dict[str, float]


async def ask_replicas(application: str, deployment: str) -> tuple[dict[str, Report], list[str]]:
    """The reports of a deployment's replicas, by the replica's name; and what was wrong with those that told none."""
    prefix = f"SERVE_REPLICA::{application}#{deployment}#"
    names = await asyncio.to_thread(_actors, prefix)
    found = await asyncio.gather(*(_ask(name) for name in names), return_exceptions=True)
    reports, wrong = {}, []
    for name, one in zip(names, found, strict=True):
        if isinstance(one, BaseException):
            wrong.append(_reason(one))
        else:
            reports[name.removeprefix(prefix)] = one
    return reports, wrong


def _actors(prefix: str) -> list[str]:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(one["name"] for one in named if one["namespace"] == NAMESPACE and one["name"].startswith(prefix))


async def _ask(name: str) -> Report:
    import ray

    async with asyncio.timeout(ANSWER_SECONDS):
        actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        report: Report = await actor.record_routing_stats.remote()
    return report


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {ANSWER_SECONDS:g} s"
    cause = getattr(error, "cause", None) or error  # of a RayTaskError
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]
