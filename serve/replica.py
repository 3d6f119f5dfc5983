"""An engine replica: one model, one thread that steps the engine, and as many clients as come.

Requests of all clients share every step (continuous batching); each gets its text token by token and an image as
soon as its last code is there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import torch

from calumma.model import MixedModalModel, load
from calumma.model.document import Document
from calumma.model.generation import Engine, Event, PromptTooLong, Request
from calumma.model.generation.answers import drawable
from calumma.model.image_tokenizer import MissingDecoder, to_image
from calumma.serve.pieces import Drawing, Finished, ImagePiece, Job, Piece, Refused, Started, TextPiece, TokenCount
from calumma.serve.settings import ServeSettings

log = logging.getLogger(__name__)

PROGRESS_STEPS = 16  # how often an image under way reports
Post = Callable[[Piece], None]


class _Codes(NamedTuple):
    """A whole image, not decoded yet."""

    codes: list[int]


_Part = TextPiece | Drawing | _Codes


class _Answer:
    """Turns one request's tokens into text without broken characters, and whole images."""

    def __init__(self, model: MixedModalModel, progress: bool, post: Post) -> None:
        self.post = post
        self.text_tokens = 0
        self.image_tokens = 0
        self._vocabulary = model.vocabulary
        self._image_length = model.image_length
        self._decoder = model.text_tokenizer.stream_decoder()
        self._codes: list[int] | None = None
        self._report_every = max(1, model.image_length // PROGRESS_STEPS) if progress else 0

    def push(self, token: int) -> list[_Part]:
        """What one more token completes."""
        vocabulary = self._vocabulary
        if token == vocabulary.begin_image:
            self.image_tokens += 1
            self._codes = []
            return [*self._text(self._decoder.finish()), *self._drawing(0)]
        if token == vocabulary.end_image:
            self.image_tokens += 1
            codes, self._codes = self._codes, None
            return [_Codes(codes)] if codes is not None and len(codes) == self._image_length else []
        if self._codes is not None and token in vocabulary.code_of:
            self.image_tokens += 1
            self._codes.append(vocabulary.code_of[token])
            return self._drawing(len(self._codes))
        self.text_tokens += 1
        return self._text(self._decoder.push(token))

    def finish(self, reason: str) -> list[Piece | _Codes]:
        count = TokenCount(self.text_tokens, self.image_tokens)
        return [*self._text(self._decoder.finish()), Finished("length" if reason == "length" else "stop", count)]

    def _text(self, text: str) -> list[_Part]:
        return [TextPiece(text)] if text else []

    def _drawing(self, done: int) -> list[_Part]:
        due = self._report_every and done % self._report_every == 0
        return [Drawing(done, self._image_length)] if due else []


class EngineLoop:
    """Steps the engine on a thread of its own for as long as there is work, and hands its events out."""

    def __init__(self, model: MixedModalModel, max_sequences: int) -> None:
        self._model = model
        self._engine = Engine(model.transformer, model.vocabulary, model.image_length, max_sequences=max_sequences)
        self._answers: dict[str, _Answer] = {}
        self._wake = threading.Condition()
        self._closed = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests in work."""
        return len(self._answers)

    def submit(self, request: Request, progress: bool, post: Post) -> None:
        """Take a request in. `post` is called on the engine's thread; Finished or Refused is always the last piece.

        Raises ValueError, of the engine's, on a request that cannot be answered.
        """
        with self._wake:
            if self._closed:
                post(self._gone())
                return
            self._engine.add(request)
            self._answers[request.id] = _Answer(self._model, progress, post)
            self._wake.notify()

    def abandon(self, request_id: str) -> None:
        """Stop working on a request; nothing more is posted for it. One that is not (or no longer) there is fine."""
        with self._wake:
            if self._answers.pop(request_id, None) is not None:
                self._engine.abort(request_id)
                self._wake.notify()

    def close(self) -> None:
        """Stop the thread; running requests are refused."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _gone(self) -> Refused:
        if self.failure is not None:
            return Refused(500, f"the engine stopped: {self.failure}", code="engine_failed")
        return Refused(503, "this replica is shutting down; try again", code="unavailable")

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._has_work():
                self._dispatch(self._engine.step())
        except Exception as error:
            log.exception("the engine stopped")
            self.failure = error
        with self._wake:
            self._closed = True
            left, self._answers = list(self._answers.values()), {}
        for answer in left:
            answer.post(self._gone())

    def _has_work(self) -> bool:
        """Wait for work; false when the loop is to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._engine.has_work)
            return not self._closed

    def _dispatch(self, events: list[Event]) -> None:
        """Post what a step brought, in order; all images it completed are decoded in one batch."""
        pieces: list[tuple[_Answer, Piece | _Codes]] = []
        for event in events:
            answer = self._answers.get(event.request_id)
            if answer is None:
                continue
            pieces += [(answer, piece) for token in event.tokens for piece in answer.push(token)]
            if event.finish is not None:
                pieces += [(answer, piece) for piece in answer.finish(event.finish)]
                self._answers.pop(event.request_id, None)
        images = iter(self._pictures([piece.codes for _, piece in pieces if isinstance(piece, _Codes)]))
        for answer, piece in pieces:
            answer.post(ImagePiece(next(images)) if isinstance(piece, _Codes) else piece)

    def _pictures(self, codes: list[list[int]]) -> list[bytes]:
        """PNG files of images given by their codes."""
        if not codes:
            return []
        tokenizer = self._model.image_tokenizer
        pixels_B3HW = tokenizer.decode(torch.tensor(codes, device=self._model.device))
        files = []
        for pixels_3HW in pixels_B3HW:
            buffer = io.BytesIO()
            to_image(pixels_3HW).save(buffer, format="PNG")
            files.append(buffer.getvalue())
        return files


class EngineReplica:
    """A `Backend` in this process: encodes prompts, hands them to the engine, streams pieces back."""

    def __init__(self, model: MixedModalModel, max_sequences: int = 16) -> None:
        self.model = model
        self.max_sequences = max_sequences
        self.loop = EngineLoop(model, max_sequences)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; Started or Refused is the first. Closing the generator abandons the job."""
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        event_loop = asyncio.get_running_loop()
        try:
            asked = drawable(job.params, self.model)
        except MissingDecoder as error:
            yield Refused(400, str(error), code="no_image_output")
            return
        params = dataclasses.replace(asked, max_tokens=job.max_tokens or self.model.config.context)
        try:
            tokens = await asyncio.to_thread(self._encode, job.prompt)
            self.loop.submit(
                Request(job.id, tokens, params), job.progress, lambda piece: _hand_over(event_loop, queue, piece)
            )
        except ValueError as error:
            code = "context_length_exceeded" if isinstance(error, PromptTooLong) else None
            yield Refused(400, str(error), code=code, param="messages" if job.prompt.is_conversation else "prompt")
            return
        ended = False
        try:
            yield Started(self._count(tokens))
            while not ended:
                for piece in _merged(await queue.get(), queue):
                    ended = isinstance(piece, Finished | Refused)
                    yield piece
        finally:
            if not ended:
                self.loop.abandon(job.id)

    async def describe(self) -> dict[str, Any]:
        """Facts for /health and the playground. Raises when the engine has failed."""
        self.check_health()
        transformer = self.model.transformer
        return {
            "context": self.model.config.context,
            "parameters": sum(p.numel() for p in transformer.parameters()),
            "image_size": self.model.image_tokenizer.config.resolution,
            "image_tokens": self.model.image_length,
            "device": str(self.model.device),
            "max_sequences": self.max_sequences,
            "running": self.loop.running,
        }

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self.loop.failure is not None:
            raise RuntimeError(f"the engine stopped: {self.loop.failure}") from self.loop.failure

    def close(self) -> None:
        self.loop.close()

    @torch.inference_mode()
    def _encode(self, prompt: Document) -> list[int]:
        return self.model.encode(prompt, complete=False)

    def _count(self, tokens: list[int]) -> TokenCount:
        vocabulary = self.model.vocabulary
        image = sum(t in vocabulary.code_of or t in (vocabulary.begin_image, vocabulary.end_image) for t in tokens)
        return TokenCount(len(tokens) - image, image)


def _hand_over(event_loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Piece], piece: Piece) -> None:
    """From the engine's thread to the request's. A loop that has ended has nobody left who waits."""
    if not event_loop.is_closed():
        event_loop.call_soon_threadsafe(queue.put_nowait, piece)


def _merged(first: Piece, queue: asyncio.Queue[Piece]) -> list[Piece]:
    """All pieces that are there by now, adjacent texts as one: a slow reader gets fewer, larger pieces."""
    pieces = [first]
    while not queue.empty():
        piece, last = queue.get_nowait(), pieces[-1]
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            pieces[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, Drawing) and isinstance(last, Drawing):
            pieces[-1] = piece
        else:
            pieces.append(piece)
    return pieces


class Replica(EngineReplica):
    """The Ray Serve deployment: an engine for the model directory at `source` (a path or s3://…)."""

    def __init__(self, settings: ServeSettings, source: str) -> None:
        from calumma.platform import cluster, tracking

        torch.set_num_threads(settings.threads or max(1, cluster.cores() // settings.min_replicas))
        cuda = settings.gpus_per_replica > 0
        with tracking.resolve_model(source, settings.tracking) as directory:
            model = load(directory, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
        super().__init__(model, settings.max_sequences)
