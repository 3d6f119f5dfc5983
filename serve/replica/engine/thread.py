"""The engine on a thread of this process: steps while there is work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from calumma.model.generation import Engine, Event, PromptTooLong, Request
from calumma.model.tokenizers.grammar import GrammarCompiler
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed
from calumma.serve.replica.engine.client import Admitted, OnOutput, engine_ended
from calumma.serve.replica.engine.detokenizer import Detokenizer, EngineModel

log = logging.getLogger(__name__)

# Seconds after which an engine without work steps once for the processes that share its model: they wait in a
# collective operation that would time out.
HEARTBEAT = 30.0
# Grammars that are compiled at once. It takes up to seconds, without the interpreter's lock; GrammarCompiler bounds it.
COMPILERS = 2


class EngineThread:
    """An `EngineClient` with the engine on a thread of this process."""

    def __init__(
        self,
        model: EngineModel,
        max_sequences: int,
        after_step: Callable[[], None] = lambda: None,
        after_submit: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """after_step: called on the engine's thread when a step's outputs are reported, and at the end. after_submit:
        called on any thread when a request is taken in or refused. options: further ones of the engine."""
        self._model, self._after_step, self._after_submit = model, after_step, after_submit
        self._heartbeat = HEARTBEAT if options.get("shard") is not None else None
        self._compiler = GrammarCompiler(model.text_tokenizer, model.vocabulary)
        self._engine = Engine(
            model.transformer,
            model.vocabulary,
            model.image_length,
            max_sequences=max_sequences,
            constraints=self._compiler,
            **options,
        )
        self._requests: dict[str, Detokenizer] = {}
        self._compiling: dict[str, OnOutput] = {}  # requests whose grammar is not compiled yet
        self._compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammars")
        self._wake = threading.Condition()
        self._closed = False
        self._step_seconds = 0.0
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return len(self._requests) + len(self._compiling)

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
            "prefix_tokens": now.prefix_tokens,
            "prefix_restored_tokens": now.restored_tokens,
            "prefix_disk_tokens": now.disk_restored_tokens,
            "host_cache_bytes": now.host_cache_bytes,
            "disk_cache_bytes": now.disk_cache_bytes,
            "disk_cache_damaged": now.disk_damaged,
            "evictions": now.evictions,
            "step_seconds": self._step_seconds,
            **asdict(now.counters),
        }

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        """Returns at once. A request with a grammar is added when that is compiled; until then it holds up nobody."""
        with self._wake:
            if engine_request.params.constraint is None or self._closed or engine_request.id in self._compiling:
                self._add(engine_request, request, on_output)
            else:
                self._compiling[engine_request.id] = on_output
                self._compilers.submit(self._compile_and_add, engine_request, request, on_output)
                return
        self._after_submit()

    def _compile_and_add(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        refused: RequestFailed | None = None
        try:
            assert engine_request.params.constraint is not None
            self._compiler(engine_request.params.constraint)  # which keeps it for the engine
        except ValueError as error:
            refused = RequestFailed(400, str(error), param=request.grammar_param)
        except Exception as error:
            log.exception("a grammar could not be compiled")
            refused = RequestFailed(500, f"the grammar could not be compiled: {type(error).__name__}")
        with self._wake:
            if self._compiling.pop(engine_request.id, None) is None:  # aborted, or the engine has ended
                return
            if refused is None:
                self._add(engine_request, request, on_output)
            else:
                on_output(refused)
        self._after_submit()

    def _add(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        """With the lock."""
        if self._closed:
            on_output(engine_ended(self.failure, in_step=False))
            return
        if engine_request.id in self._compiling:
            on_output(_in_use(engine_request.id))
            return
        try:
            self._engine.add(engine_request)
        except ValueError as error:
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            on_output(RequestFailed(400, str(error), code=code))
        except Exception as error:
            log.exception("a request could not be taken in")
            on_output(RequestFailed(500, f"the request could not be taken in: {type(error).__name__}"))
        else:
            on_output(Admitted())
            self._requests[engine_request.id] = Detokenizer(self._model, request, on_output)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._compiling.pop(request_id, None)
            if self._requests.pop(request_id, None) is not None:
                self._engine.abort(request_id)
                self._wake.notify()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        self._compilers.shutdown(wait=False, cancel_futures=True)

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
            compiling, self._compiling = self._compiling, {}
        for on_output in compiling.values():
            on_output(engine_ended(self.failure, in_step=False))
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


def _in_use(request_id: str) -> RequestFailed:
    return RequestFailed(400, f"a request with the id {request_id!r} is being answered")


def requests_in_step(error: Exception) -> tuple[str, ...] | None:
    """Who was in the step that raised (generation.StepFailed says so); None: anybody."""
    found: tuple[str, ...] | None = getattr(error, "request_ids", None)
    return found
