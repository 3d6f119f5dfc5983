"""The engine on a thread of this process: steps while there is work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from calumma.model.generation import Engine, Event, PromptTooLong, Request
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed
from calumma.serve.replica.engine.client import Admitted, OnOutput, engine_ended
from calumma.serve.replica.engine.detokenizer import Detokenizer, EngineModel

log = logging.getLogger(__name__)


# Seconds after which an engine without work that is one of several says so to the others, who would give it up.
HEARTBEAT = 30.0


class EngineThread:
    """A `Loop` on a thread of this process."""

    def __init__(
        self, model: EngineModel, max_sequences: int, stepped: Callable[[], None] = lambda: None, **engine: Any
    ) -> None:
        """stepped: called on the engine's thread when what a step brought is posted, and at the end. engine: further
        options of it."""
        self._model, self._stepped = model, stepped
        self._heartbeat = HEARTBEAT if engine.get("shard") is not None else None
        self._engine = Engine(
            model.transformer, model.vocabulary, model.image_length, max_sequences=max_sequences, **engine
        )
        self._answers: dict[str, Detokenizer] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._step_seconds = 0.0
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._answers)

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._engine.has_work

    def statistics(self) -> dict[str, float]:
        now = self._engine.statistics
        return {
            "requests_running": now.running_text + now.running_image,
            "requests_waiting": now.waiting,
            "queued_tokens": now.waiting_tokens,
            "running_text": now.running_text,
            "running_image": now.running_image,
            "cache_used_ratio": now.blocks_used / now.blocks,
            "cache_kept_ratio": now.blocks_cached / now.blocks,
            "prefix_hit_tokens": now.prefix_hit_tokens,
            "evictions": now.evictions,
            "step_seconds": self._step_seconds,
            **asdict(now.counters),
        }

    def submit(self, request: Request, job: GenerationRequest, post: OnOutput) -> None:
        with self._wake:
            if self._closed:
                post(engine_ended(self.failure))
                return
            try:
                self._engine.add(request)
            except ValueError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
                post(RequestFailed(400, str(error), code=code))
                return
            post(Admitted())
            self._answers[request.id] = Detokenizer(self._model, job, post)
            self._wake.notify()

    def abandon(self, request_id: str) -> None:
        """Nothing more is posted for it."""
        with self._wake:
            if self._answers.pop(request_id, None) is not None:
                self._engine.abort(request_id)
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._has_work():
                begin = time.perf_counter()
                events = self._engine.step()
                self._step_seconds += time.perf_counter() - begin
                self._dispatch(events)
                self._stepped()
        except Exception as error:
            log.exception("the engine stopped")
            self.failure = error
        with self._wake:
            self._closed = True
            left, self._answers = list(self._answers.values()), {}
        for answer in left:
            answer.post(engine_ended(self.failure))
        self._stepped()
        if self.failure is None:
            self._engine.close()

    def _has_work(self) -> bool:
        """Wait for work, or for the next heartbeat; false when the loop is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._engine.has_work, self._heartbeat)
            return not self._closed

    def _dispatch(self, events: list[Event]) -> None:
        """Post what a step brought, in order."""
        with self._wake:  # not while a request is taken in: the step may have begun with it already
            answers = [(event, self._answers.get(event.request_id)) for event in events]
        for event, answer in answers:
            if answer is None or event.request_id not in self._answers:
                continue
            parts = answer.take(event)
            if parts and isinstance(parts[-1], Finished):
                with self._wake:
                    self._answers.pop(event.request_id, None)
                    if event.finish is None:  # a stop string
                        self._engine.abort(event.request_id)
            for part in parts:
                answer.post(part)
