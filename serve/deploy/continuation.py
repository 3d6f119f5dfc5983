"""Outputs that outlive their replica: another one goes on from the tokens that have come.

An answer is a function of its request and seed, so what the other replica sends is what the lost one would have sent.

- The client sees each event once: what it has been sent is left out by the other replica, by number.
- A seed that the request leaves open is drawn here, before the first replica sees it.
- A request that has failed, by itself or in a step that failed, is never sent on: RequestFailed is final but for
  UNAVAILABLE, which says that the request had no part in it.
- A request that loses ATTEMPTS replicas and gains nothing in between is given up: it may be what they die of.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from calumma.serve.protocol import (
    FINAL_EVENTS,
    OVERLOADED,
    UNAVAILABLE,
    Continuation,
    EventBatch,
    GenerationRequest,
    OutputEvent,
    OutputStream,
    RequestFailed,
    Started,
)

log = logging.getLogger(__name__)

ATTEMPTS = 4  # replicas that a request may lose without a token or event in between
# Until the router sends nothing more to a replica: one whose process is lost, or that it is told to avoid; one that
# ends because its engine has failed; and in any case.
LOST_SECONDS, FAILED_SECONDS, REPLICA_GONE_SECONDS = 0.1, 1.0, 2.0

Ask = Callable[[GenerationRequest], AsyncGenerator[EventBatch, None]]


class ReplicaLost(Exception):
    """The replica was lost that a request was at; the message says how. seconds: until it is not asked again."""

    def __init__(self, message: str, seconds: float = LOST_SECONDS) -> None:
        super().__init__(message)
        self.seconds = seconds


class ReplicasBusy(Exception):
    """No replica takes a further request in now."""


async def unbroken(request: GenerationRequest, ask: Ask) -> OutputStream:
    """The output of a request. ask(request): what a replica makes of it, perhaps with a `continuation`; raises
    ReplicaLost or ReplicasBusy."""
    request = seeded(request)
    tokens: list[int] = []
    avoid: tuple[str, ...] = ()
    sent = losses = attempt = 0
    started = False
    while True:
        attempt, pause, replica = attempt + 1, REPLICA_GONE_SECONDS, None
        continuation = Continuation(tuple(tokens), sent) if started else None
        asked = replace(
            request,
            id=f"{request.id}-{attempt}",  # a replica may still work on the last attempt
            avoid=avoid,
            continuation=continuation,
            echo=request.echo and not started,
        )
        try:
            async with aclosing(ask(asked)) as batches:
                async for batch in batches:
                    replica = batch.replica or replica
                    if batch.tokens or batch.count:
                        losses = 0
                    tokens += batch.tokens
                    sent += batch.count
                    for event in batch.events:
                        if isinstance(event, Started) and started:
                            continue
                        _raise_if_not_final(event, started)
                        started = True
                        yield event
                        if isinstance(event, FINAL_EVENTS):
                            return
            raise ReplicaLost("its output ended before the end")
        except ReplicasBusy:
            if not started:
                message = "all replicas are busy and the queue is full; try again shortly"
                yield RequestFailed(429, message, code=OVERLOADED)
                return
        except ReplicaLost as loss:
            losses += 1
            if losses == 1:
                pause = min(pause, loss.seconds if replica is None else LOST_SECONDS)
            if replica is not None:
                avoid = (*avoid, replica)
            log.warning("%s: replica lost (%s); %d tokens have come", request.id, loss, len(tokens))
            if losses == ATTEMPTS:
                message = f"{losses} replicas were lost one after the other while answering ({loss}); try again"
                yield RequestFailed(503, message, code=UNAVAILABLE)
                return
        await asyncio.sleep(pause)


def seeded(request: GenerationRequest) -> GenerationRequest:
    """The request with a seed of its own, where it leaves that open."""
    if request.params.seed not in (None, -1):
        return request
    return replace(request, params=replace(request.params, seed=secrets.randbits(63)))


def _raise_if_not_final(event: OutputEvent, started: bool) -> None:
    """Raises ReplicaLost or ReplicasBusy for failures that the request has no part in."""
    if isinstance(event, RequestFailed):
        if event.code == UNAVAILABLE:
            raise ReplicaLost(event.message, FAILED_SECONDS)
        if event.code == OVERLOADED and started:
            raise ReplicasBusy
