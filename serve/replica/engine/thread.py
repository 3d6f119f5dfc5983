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

# Seconds after which an engine without work steps once for the processes that share its model: they wait in a
# collective operation that would time out.
HEARTBEAT = 30.0


class EngineThread:
    """An `EngineClient` with the engine on a thread of this process."""

    def __init__(
        self, model: EngineModel, max_sequences: int, after_step: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        """after_step: called on the engine's thread when a step's outputs are reported, and at the end. options:
        further ones of the engine."""
        self._model, self._after_step = model, after_step
        self._heartbeat = HEARTBEAT if options.get("shard") is not None else None
        self._drafts = bool(options.get("jacobi_window"))  # an image's codes then depend on where its drafts begin
        self._engine = Engine(
            model.transformer, model.vocabulary, model.image_length, max_sequences=max_sequences, **options
        )
        self._requests: dict[str, Detokenizer] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._step_seconds = 0.0
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._requests)

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

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        with self._wake:
            if self._closed:
                on_output(engine_ended(self.failure, in_step=False))
                return
            try:
                self._engine.add(engine_request)
            except ValueError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
                on_output(RequestFailed(400, str(error), code=code))
                return
            on_output(Admitted())
            self._requests[engine_request.id] = Detokenizer(self._model, request, on_output, self._drafts)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        with self._wake:
            if self._requests.pop(request_id, None) is not None:
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
                self._after_step()
        except Exception as error:
            log.exception("the engine stopped")
            self.failure = error
        with self._wake:
            self._closed = True
            left, self._requests = self._requests, {}
        in_step = None if self.failure is None else requests_in_step(self.failure)
        for request_id, request in left.items():
            request.on_output(engine_ended(self.failure, in_step is None or request_id in in_step))
        self._after_step()
        if self.failure is None:
            self._engine.close()

    def _has_work(self) -> bool:
        """Wait for work, or for the next heartbeat; false when the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._engine.has_work, self._heartbeat)
            return not self._closed

    def _dispatch(self, events: list[Event]) -> None:
        """Report what a step brought, in order."""
        with self._wake:  # not while a request is taken in: the step may have begun with it already
            pairs = [(event, self._requests.get(event.request_id)) for event in events]
        for event, request in pairs:
            if request is None or event.request_id not in self._requests:
                continue
            outputs = request.process(event)
            if outputs and isinstance(outputs[-1], Finished | RequestFailed):
                with self._wake:
                    self._requests.pop(event.request_id, None)
                    if event.finish is None:  # a stop string
                        self._engine.abort(event.request_id)
            for output in outputs:
                request.on_output(output)


def requests_in_step(error: Exception) -> tuple[str, ...] | None:
    """Who was in the step that raised (generation.StepFailed says so); None: anybody."""
    found: tuple[str, ...] | None = getattr(error, "request_ids", None)
    return found
