"""The generation engine: add requests, step, read events. Requests join and leave at any step.

All running sequences, in whatever phase, share every decoding pass. Unlike the public release, which batches one
modality at a time and computes the whole prompt anew at each change of phase (paper, "Generation").
"""

from __future__ import annotations

from collections import deque
from itertools import chain

import torch

from calumma.model.generation.request import Event, Request
from calumma.model.generation.runner import Runner
from calumma.model.generation.scheduler import Scheduler
from calumma.model.generation.sequence import Generation, Need
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary


class Engine:
    """Continuous batching over a cache of `max_sequences` slots; guidance branches take slots too.

    image_length: codes of an image. context: most tokens of prompt and answer, the model's by default.
    prefill_tokens: most prompt tokens a step takes in, so that a long prompt does not hold up those who are answering.
    image_burst: most codes a step draws at once when all requests are within images and none is waiting to be taken in.
    The transformer is put into evaluation mode. `add`, `abort` and `has_work` may be called from other threads while
    one thread calls `step`.
    """

    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        image_length: int,
        max_sequences: int = 16,
        context: int | None = None,
        *,
        prefill_tokens: int = 2048,
        image_burst: int = 8,
    ) -> None:
        longest = transformer.config.context
        self.context = longest if context is None else context
        if not 2 <= self.context <= longest:
            raise ValueError(f"context {context} must lie in 2..{longest}, the model's")
        if transformer.config.vocabulary_size < vocabulary.size:
            raise ValueError(
                f"the model knows {transformer.config.vocabulary_size} ids, its vocabulary has {vocabulary.size}"
            )
        for name, value in [
            ("image_length", image_length),
            ("max_sequences", max_sequences),
            ("prefill_tokens", prefill_tokens),
            ("image_burst", image_burst),
        ]:
            if value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")
        self.vocabulary, self.image_length, self.max_sequences = vocabulary, image_length, max_sequences
        self.prefill_tokens, self.image_burst = prefill_tokens, image_burst
        self._runner = Runner(transformer.eval(), vocabulary, max_sequences, self.context)
        self._scheduler = Scheduler(vocabulary, image_length, max_sequences)
        self._known: set[str] = set()
        # What other threads ask for, in order, until the next step takes it up; None is an abort.
        self._inbox: deque[tuple[str, tuple[Request, Need] | None]] = deque()

    def add(self, request: Request) -> None:
        """Put a request in line. Nothing else is disturbed when it is refused: PromptTooLong, or ValueError on a prompt
        that is no prompt, on an id in use, and on guidance that needs more slots than there are."""
        if request.id in self._known:
            raise ValueError(f"a request with the id {request.id!r} is being answered")
        need = Need.of(request, self.vocabulary, self.image_length, self.context)
        if need.slots > self.max_sequences:
            raise ValueError(
                f"the request needs {need.slots} sequences at once, {need.slots - 1} of them for image guidance; "
                f"the engine has {self.max_sequences}. More max_sequences, or both guidance scales at 1, would do"
            )
        self._known.add(request.id)
        self._inbox.append((request.id, (request, need)))

    def abort(self, request_id: str) -> None:
        """End a request; the next step frees its slots and reports it "aborted". Nothing happens if it has ended."""
        if request_id in self._known:
            self._inbox.append((request_id, None))

    @property
    def has_work(self) -> bool:
        """Whether there is anything a step would do."""
        return bool(self._known)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests in line for slots."""
        return len(self._known) - self.running

    @property
    def free_sequences(self) -> int:
        """Cache slots no request holds."""
        return len(self._scheduler.free)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Take up what was asked, prefill, and decode one token (or several image codes) of every request that is
        ready. One event a request that moved or ended; an empty list while only prompts are taken in."""
        events = self._take_up()
        for generation in self._scheduler.admit():
            self._runner.seat(generation.full.slot, generation.params)
        running = self._scheduler.running
        self._runner.prefill(list(chain.from_iterable(g.sequences for g in running)), self.prefill_tokens)
        ready = [generation for generation in running if generation.ready]
        if ready:
            sampled, logprobs = self._runner.decode(ready, self._steps(ready))
            for generation, tokens, values in zip(ready, sampled, logprobs, strict=True):
                events.append(generation.accept(tokens, values))
                if generation.finish:
                    self._scheduler.release(generation)
                    self._known.discard(generation.request.id)
        return events

    def _take_up(self) -> list[Event]:
        events = []
        while self._inbox:
            request_id, asked = self._inbox.popleft()
            if asked is not None:
                self._scheduler.waiting.append(asked)
            elif request_id in self._known:
                phase = self._scheduler.remove(request_id)
                self._known.discard(request_id)
                events.append(Event(request_id, [], phase, "aborted"))
        return events

    def _steps(self, ready: list[Generation]) -> int:
        """Decoding passes until something may depend on what is sampled, or somebody may join."""
        if len(ready) < len(self._scheduler.running) or self._inbox:
            return 1
        return max(1, min(self.image_burst, *(generation.codes_left for generation in ready)))
