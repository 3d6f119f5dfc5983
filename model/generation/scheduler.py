"""Who runs: requests wait in order of arrival for the cache slots they may need, guidance branches included.

A request gets all its slots when it starts and keeps them to its end. Taking the branches' slots only when an image
begins would use the cache better while it writes text, but two requests waiting for each other's slots would do so
for ever.
"""

from __future__ import annotations

from collections import deque

from calumma.model.generation.request import Phase, Request
from calumma.model.generation.sequence import Generation, Need
from calumma.model.vocabulary import Vocabulary


class Scheduler:
    def __init__(self, vocabulary: Vocabulary, image_length: int, slots: int) -> None:
        self.vocabulary, self.image_length = vocabulary, image_length
        self.free = list(reversed(range(slots)))
        self.waiting: deque[tuple[Request, Need]] = deque()
        self.running: list[Generation] = []

    def admit(self) -> list[Generation]:
        """Start waiting requests while slots last. Nobody overtakes, so a large request is not starved."""
        started = []
        while self.waiting and self.waiting[0][1].slots <= len(self.free):
            request, need = self.waiting.popleft()
            slots = [self.free.pop() for _ in range(need.slots)]
            started.append(Generation(request, need, slots, self.vocabulary, self.image_length))
        self.running += started
        return started

    def release(self, generation: Generation) -> None:
        self.running.remove(generation)
        self.free += generation.slots

    def remove(self, request_id: str) -> Phase:
        """Take a request out, waiting or running; the phase it was in. Raises KeyError if it is neither."""
        for waiting in self.waiting:
            if waiting[0].id == request_id:
                self.waiting.remove(waiting)
                return "text"
        for generation in self.running:
            if generation.request.id == request_id:
                self.release(generation)
                return generation.phase
        raise KeyError(request_id)
