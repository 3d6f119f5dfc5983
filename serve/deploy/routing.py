"""Which replica gets a request."""

from __future__ import annotations

import hashlib

from ray.serve.request_router import LocalityMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from calumma.model.document import Document, Text
from calumma.serve.protocol import GenerationRequest

PREFIX_LENGTH = 512  # of a prompt that the choice depends on: characters, or token ids
MAX_IMBALANCE = 4  # requests that the preferred replica may have beyond the least busy one


def prefix_key(request: GenerationRequest) -> bytes:
    """Equal for prompts that begin alike: the same system text, the same first images, later turns of one chat."""
    digest = hashlib.sha256()
    left = PREFIX_LENGTH
    for part in request.prompt.segments if isinstance(request.prompt, Document) else (request.prompt,):
        if isinstance(part, tuple):
            digest.update(repr(part[:left]).encode())
            break
        if isinstance(part, Text):
            digest.update(part.text[:left].encode())
            left -= len(part.text)
        else:
            digest.update(hashlib.sha256(part.png() if not isinstance(part.data, bytes) else part.data).digest())
            left -= PREFIX_LENGTH // 4
        if left <= 0:
            break
    return digest.digest()


def preferred_replica(key: bytes, replicas: list[str]) -> str:
    """Rendezvous hashing: each key has its own order of replicas, so one that comes or goes moves only its own share
    of the keys (Thaler and Ravishankar 1998)."""
    return max(replicas, key=lambda name: hashlib.sha256(key + name.encode()).digest())


class PrefixRouter(LocalityMixin, MultiplexMixin, RequestRouter):
    """Prompts that begin alike go to the same replica, whose cache has what they share, unless it is clearly busier
    than another; then, and for all other calls, the least busy one is taken."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        request = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(request, GenerationRequest) or len(candidate_replicas) == 1:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        first = by_name[preferred_replica(prefix_key(request), list(by_name))]
        others = [replica for replica in candidate_replicas if replica is not first]
        return [candidate_replicas] if self._busy(first, others) else [[first], others]

    def _busy(self, first: RunningReplica, others: list[RunningReplica]) -> bool:
        """By the known queue lengths; an unknown one counts as empty."""

        def length(replica: RunningReplica) -> int:
            return self.replica_queue_len_cache.get(replica.replica_id) or 0

        return length(first) > min(map(length, others)) + MAX_IMBALANCE
