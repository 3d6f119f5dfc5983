"""The engine's thread: steps while there is work, and turns each request's tokens into text and images' codes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from calumma.model.generation import Engine, Event, PromptTooLong, Request
from calumma.model.generation.request import Logprob
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.pieces import ENGINE_FAILED, Drawing, Finished, Job, Refused, TextPiece, Token, TokenCount
from calumma.serve.text import TextStream, Top

log = logging.getLogger(__name__)

PROGRESS_STEPS = 16  # how often an image under way reports
# Seconds after which an engine without work that is one of several says so to the others, who would give it up.
HEARTBEAT = 30.0


class Language(Protocol):
    """What the loop needs of a model."""

    @property
    def transformer(self) -> Transformer: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def text_tokenizer(self) -> TextTokenizer: ...
    @property
    def image_length(self) -> int: ...


@dataclass(frozen=True)
class Taken:
    """The engine has taken the request in."""


@dataclass(frozen=True)
class Codes:
    """Codes of an image, not decoded yet: all of them, or those of a preview."""

    codes: list[int]
    total: int
    began: float  # time.monotonic()


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the prompt's tokens after the first."""

    values: list[Logprob]


Part = Taken | TextPiece | Drawing | Codes | Scored | Finished | Refused
Post = Callable[[Part], None]


class Loop(Protocol):
    """An engine at work, on a thread of this process or in a process of its own."""

    failure: Exception | None

    @property
    def running(self) -> int:
        """Requests in work."""
        ...

    @property
    def waiting(self) -> int:
        """Requests in line for the engine."""
        ...

    def statistics(self) -> dict[str, float]:
        """Numbers for metrics and autoscaling, named as in metrics.py."""
        ...

    def submit(self, request: Request, job: Job, post: Post) -> None:
        """Take a request in. `post` is called on any thread: first with Taken, last with Finished or Refused; with
        Refused alone where the request cannot be answered."""
        ...

    def abandon(self, request_id: str) -> None:
        """Stop working on a request. One that is not (or no longer) there is fine."""
        ...

    def close(self) -> None:
        """End; running requests are refused."""
        ...


class Answer:
    """Turns one request's tokens into text without broken characters, and images' codes."""

    def __init__(self, model: Language, job: Job, post: Post) -> None:
        self.job, self.post = job, post
        self.text_tokens = 0
        self.image_tokens = 0
        self._vocabulary = model.vocabulary
        self._length = model.image_length
        self._tokenizer = model.text_tokenizer
        self._stream = self._new_stream()
        self._codes: list[int] | None = None
        self._began = 0.0
        self._report_every = max(1, model.image_length // PROGRESS_STEPS) if job.progress else 0
        self._preview_at = {(k + 1) * self._length // (job.previews + 1) for k in range(job.previews)}

    def take(self, event: Event) -> list[Part]:
        """What an event of the engine brings; with a stop string, Finished ends it early."""
        parts: list[Part] = [] if event.prompt_logprobs is None else [Scored(event.prompt_logprobs)]
        for at, token in enumerate(event.tokens):
            logprob = event.logprobs[at] if at < len(event.logprobs) else None
            top = event.top_logprobs[at] if at < len(event.top_logprobs) else ()
            parts += self._push(token, logprob, tuple((i, self._tokenizer.surface(i), value) for i, value in top))
            if self._stream.stopped:
                return [*parts, self._finished("stop")]
        if event.finish is not None:
            parts += self._rest()
            if event.finish == "stop" and event.phase == "text" and self.job.logprobs is not None:
                parts.append(self._stop_token(event))
            parts.append(self._finished("stop" if self._stream.stopped else event.finish))
        return parts

    def _push(self, token: int, logprob: float | None, top: Top) -> list[Part]:
        vocabulary = self._vocabulary
        if token == vocabulary.begin_image:
            self.image_tokens += 1
            self._codes, self._began = [], time.monotonic()
            rest = self._rest()
            if not self._stream.stopped:
                self._stream = self._new_stream()
            return [*rest, *self._drawing(0)]
        if token == vocabulary.end_image:
            self.image_tokens += 1
            codes, self._codes = self._codes, None
            whole = codes is not None and len(codes) == self._length
            return [Codes(codes, self._length, self._began)] if codes is not None and whole else []
        if self._codes is not None and token in vocabulary.code_of:
            self.image_tokens += 1
            self._codes.append(vocabulary.code_of[token])
            return self._drawing(len(self._codes))
        self.text_tokens += 1
        surface = self._tokenizer.surface(token) if self.job.logprobs is not None else b""
        piece = self._stream.push(token, surface, logprob, top)
        return [piece] if piece else []

    def _new_stream(self) -> TextStream:
        return TextStream(self._tokenizer.stream_decoder(), self.job.stop, self.job.logprobs is not None)

    def _rest(self) -> list[Part]:
        piece = self._stream.finish()
        return [piece] if piece else []

    def _drawing(self, done: int) -> list[Part]:
        parts: list[Part] = []
        if self._report_every and done % self._report_every == 0:
            parts.append(Drawing(done, self._length))
        if done in self._preview_at and self._codes is not None and done < self._length:
            parts.append(Codes(list(self._codes), self._length, self._began))
        return parts

    def _stop_token(self, event: Event) -> TextPiece:
        """The stop id, which has no text, as the token that ends the log-probabilities (as in vLLM)."""
        logprob = event.logprobs[-1] if len(event.logprobs) > len(event.tokens) else None
        return TextPiece("", (Token(self._vocabulary.eos, b"", self._stream.length, logprob),))

    def _finished(self, reason: str) -> Finished:
        count = TokenCount(self.text_tokens, self.image_tokens)
        return Finished("length" if reason == "length" else "stop", count)


class EngineLoop:
    """A `Loop` on a thread of this process."""

    def __init__(
        self, model: Language, max_sequences: int, stepped: Callable[[], None] = lambda: None, **engine: Any
    ) -> None:
        """stepped: called on the engine's thread when what a step brought is posted, and at the end. engine: further
        options of it."""
        self._model, self._stepped = model, stepped
        self._heartbeat = HEARTBEAT if engine.get("shard") is not None else None
        self._engine = Engine(
            model.transformer, model.vocabulary, model.image_length, max_sequences=max_sequences, **engine
        )
        self._answers: dict[str, Answer] = {}
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

    def submit(self, request: Request, job: Job, post: Post) -> None:
        with self._wake:
            if self._closed:
                post(gone(self.failure))
                return
            try:
                self._engine.add(request)
            except ValueError as error:
                code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
                post(Refused(400, str(error), code=code))
                return
            post(Taken())
            self._answers[request.id] = Answer(self._model, job, post)
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
            answer.post(gone(self.failure))
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


def gone(failure: Exception | None) -> Refused:
    """Why an engine that has ended answers nothing."""
    if failure is not None:
        return Refused(500, f"the engine stopped: {failure}", code=ENGINE_FAILED)
    return Refused(503, "this replica is shutting down; try again", code="unavailable")
