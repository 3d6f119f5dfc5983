"""Which replica gets a request."""

from __future__ import annotations

import hashlib
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from calumma.model.document import Document, Text
from calumma.serve.protocol import GenerationRequest

PREFIX_LENGTH = 512  # of a prompt that the choice depends on: characters, or token ids
MAX_IMBALANCE = 4  # requests that the preferred replica may have beyond the least busy one


def prefix_key(request: GenerationRequest) -> bytes:
    """Equal for prompts of one salt that begin alike: the same system text, the same first images, later turns of one
    chat."""
    digest = hashlib.sha256(request.salt)
    left = PREFIX_LENGTH
    for part in request.prompt.segments if isinstance(request.prompt, Document) else (request.prompt,):
        if isinstance(part, tuple):
            digest.update(repr(part[:left]).encode())
            break
        if isinstance(part, Text):
            digest.update(part.text[:left].encode())
            left -= len(part.text)
        else:
            pixels = part.data if isinstance(part.data, bytes) else part.data.tobytes()
            digest.update(hashlib.sha256(pixels).digest())
            left -= PREFIX_LENGTH // 4
        if left <= 0:
            break
    return digest.digest()


def preferred_replica(key: bytes, replicas: list[str]) -> str:
    """Rendezvous hashing: each key has its own order of replicas, so one that comes or goes moves only its own share
    of the keys (Thaler and Ravishankar 1998)."""
    return max(replicas, key=lambda name: hashlib.sha256(key + name.encode()).digest())


class PrefixRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """Prompts that begin alike go to the same replica, whose cache has what they share, unless it is clearly busier
    than another; then, and for all other calls, the least busy one is taken.

    A replica that is found goes to the call it was found for, or, where calls wait for room, to the one that has waited
    longest. Ray's default takes the call by the id of the HTTP request instead, which all its calls share (n answers
    are n calls): the others would look for a replica for ever, and let nobody else run meanwhile.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:  # where none of them has room, look again later instead of at once
            pending_request.routing_context.should_backoff = True
        if not candidate_replicas:
            return []
        request = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(request, GenerationRequest):
            return [candidate_replicas]
        well = [replica for replica in candidate_replicas if replica.replica_id.unique_id not in request.avoid]
        candidate_replicas = well or candidate_replicas
        if len(candidate_replicas) == 1:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        first = by_name[preferred_replica(prefix_key(request), list(by_name))]
        others = [replica for replica in candidate_replicas if replica is not first]
        return [candidate_replicas] if self._busy(first, others) else [[first], others]

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """FIFOMixin's hook: who gets a replica that was found for the call with this metadata; None is the first in
        line. The metadata is of one call alone."""
        if self.num_routing_tasks_in_backoff:
            return None
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _busy(self, first: RunningReplica, others: list[RunningReplica]) -> bool:
        """By the known queue lengths; an unknown one counts as empty."""

        def length(replica: RunningReplica) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        return length(first) > min(map(length, others)) + MAX_IMBALANCE
