"""From one request's tokens to text and codes of images."""

from __future__ import annotations

import time
from typing import Protocol

from calumma.model.generation import Event
from calumma.model.text_tokenizer import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.protocol import Finished, GenerationRequest, ImageProgress, TextDelta, Token, TokenCount
from calumma.serve.replica.engine.client import EngineOutput, ImageCodes, OnOutput, PromptLogprobs
from calumma.serve.replica.text_stream import TextStream, TopLogprobs

PROGRESS_STEPS = 16  # how often an image under way reports


class EngineModel(Protocol):
    """What the loop needs of a model."""

    @property
    def transformer(self) -> Transformer: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def text_tokenizer(self) -> TextTokenizer: ...
    @property
    def image_length(self) -> int: ...


class Detokenizer:
    """Turns one request's tokens into text without broken characters, and images' codes."""

    def __init__(self, model: EngineModel, job: GenerationRequest, post: OnOutput) -> None:
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

    def take(self, event: Event) -> list[EngineOutput]:
        """What an event of the engine brings; with a stop string, Finished ends it early."""
        parts: list[EngineOutput] = [] if event.prompt_logprobs is None else [PromptLogprobs(event.prompt_logprobs)]
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

    def _push(self, token: int, logprob: float | None, top: TopLogprobs) -> list[EngineOutput]:
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
            return [ImageCodes(codes, self._length, self._began)] if codes is not None and whole else []
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

    def _rest(self) -> list[EngineOutput]:
        piece = self._stream.finish()
        return [piece] if piece else []

    def _drawing(self, done: int) -> list[EngineOutput]:
        parts: list[EngineOutput] = []
        if self._report_every and done % self._report_every == 0:
            parts.append(ImageProgress(done, self._length))
        if done in self._preview_at and self._codes is not None and done < self._length:
            parts.append(ImageCodes(list(self._codes), self._length, self._began))
        return parts

    def _stop_token(self, event: Event) -> TextDelta:
        """The stop id, which has no text, as the token that ends the log-probabilities (as in vLLM)."""
        logprob = event.logprobs[-1] if len(event.logprobs) > len(event.tokens) else None
        return TextDelta("", (Token(self._vocabulary.eos, b"", self._stream.length, logprob),))

    def _finished(self, reason: str) -> Finished:
        count = TokenCount(self.text_tokens, self.image_tokens)
        return Finished("length" if reason == "length" else "stop", count)
