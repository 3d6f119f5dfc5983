"""From the engine's tokens of one request to text and codes of images."""

from __future__ import annotations

import time
from typing import Protocol

from calumma.model.generation import Event, Logprob
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.protocol import (
    OUT_OF_MEMORY,
    REQUEST_FAILED,
    Continuation,
    Finished,
    GenerationRequest,
    ImageProgress,
    RequestFailed,
    TextDelta,
    Token,
    TokenCount,
)
from calumma.serve.replica.engine.client import Answered, EngineOutput, ImageCodes, OnOutput, PromptLogprobs
from calumma.serve.replica.text_stream import TextStream, TopLogprobs

PROGRESS_STEPS = 16  # reports of one image's progress, and of its codes
# Kinds of failure (generation.Failure) that are not the server's, by the status and code that tell a client.
STATUS = {"no token": (400, "no_token"), "out of memory": (503, OUT_OF_MEMORY)}


class EngineModel(Protocol):
    """What the engine and its detokenizers need of a model."""

    @property
    def transformer(self) -> Transformer: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def text_tokenizer(self) -> TextTokenizer: ...
    @property
    def image_length(self) -> int: ...


class Detokenizer:
    """Turns one request's tokens into text, without broken characters and up to a stop string, and into codes of
    images.

    The outputs are a function of the tokens, whatever steps these come in. So an answer that is continued passes
    through here from its beginning, and what has been sent of it is left out.
    """

    def __init__(self, model: EngineModel, request: GenerationRequest, on_output: OnOutput) -> None:
        self.request, self.on_output = request, on_output
        self.text_tokens = 0
        self.image_tokens = 0
        self._vocabulary = model.vocabulary
        self._length = model.image_length
        self._tokenizer = model.text_tokenizer
        self._stream = self._new_stream()
        self._codes: list[int] | None = None
        self._began = 0.0
        self._checkpoint = max(1, model.image_length // PROGRESS_STEPS)
        self._report_every = self._checkpoint if request.progress else 0
        self._preview_at = {(k + 1) * self._length // (request.previews + 1) for k in range(request.previews)}
        continuation = request.continuation or Continuation()
        self._sent, self._known = continuation.events, len(continuation.tokens)  # left to be left out
        self._untold: list[int] = []  # ids that no Answered has had

    def process(self, event: Event) -> list[EngineOutput]:
        """The outputs of an event of the engine; a stop string ends them early with Finished."""
        scores: list[EngineOutput] = [] if event.prompt_logprobs is None else [PromptLogprobs(event.prompt_logprobs)]
        outputs = self._outputs(event)
        new = outputs[self._sent :]
        self._sent -= len(outputs) - len(new)
        if outputs and isinstance(outputs[-1], Finished | RequestFailed):
            return [*scores, *(new or outputs[-1:])]
        return [*scores, *new, *self._answered(bool(new))]

    def _answered(self, news: bool) -> list[EngineOutput]:
        """The ids that another replica can go on from, where they are worth a message: with other outputs, or after
        some codes of an image."""
        ready = len(self._untold)
        if self.request.logprobs is not None:  # an id that is given is not scored again
            ready -= self._stream.pending
        if ready <= 0 or not (news or ready >= self._checkpoint):
            return []
        told, self._untold = self._untold[:ready], self._untold[ready:]
        return [Answered(tuple(told))]

    def _outputs(self, event: Event) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        for i, token in enumerate(event.tokens):
            if self._known:
                self._known -= 1
            else:
                self._untold.append(token)
            logprob = event.logprobs[i] if i < len(event.logprobs) else None
            top = event.top_logprobs[i] if i < len(event.top_logprobs) else ()
            outputs += self._push(token, logprob, tuple((id, self._tokenizer.surface(id), value) for id, value in top))
            if self._stream.stopped:
                return [*outputs, self._finished("stop")]
        failure = getattr(event, "failure", None)
        if failure is not None:
            status, code = STATUS.get(failure.kind, (500, REQUEST_FAILED))
            return [*outputs, *self._flush_text(), RequestFailed(status, failure.message, code=code)]
        if event.finish is not None:
            outputs += self._flush_text()
            if event.stop_id is not None and self.request.logprobs is not None and not self._stream.stopped:
                outputs.append(self._stop_token(event.stop_id, event.stop_logprob))
            outputs.append(self._finished("stop" if self._stream.stopped else event.finish))
        return outputs

    def _push(self, token: int, logprob: float | None, top: TopLogprobs) -> list[EngineOutput]:
        vocabulary = self._vocabulary
        if token == vocabulary.begin_image:
            self.image_tokens += 1
            self._codes, self._began = [], time.monotonic()
            text = self._flush_text()
            if not self._stream.stopped:
                self._stream = self._new_stream()
            return [*text, *self._image_progress(0)]
        if token == vocabulary.end_image:
            self.image_tokens += 1
            codes, self._codes = self._codes, None
            complete = codes is not None and len(codes) == self._length
            return [ImageCodes(codes, self._length, self._began)] if codes is not None and complete else []
        if self._codes is not None and token in vocabulary.code_of:
            self.image_tokens += 1
            self._codes.append(vocabulary.code_of[token])
            return self._image_progress(len(self._codes))
        self.text_tokens += 1
        surface = self._tokenizer.surface(token) if self.request.logprobs is not None else b""
        stops = self.text_tokens + self.image_tokens > self.request.params.min_tokens
        delta = self._stream.push(token, surface, logprob, top, stops)
        return [delta] if delta else []

    def _new_stream(self) -> TextStream:
        return TextStream(self._tokenizer.stream_decoder(), self.request.stop, self.request.logprobs is not None)

    def _flush_text(self) -> list[EngineOutput]:
        delta = self._stream.finish()
        return [delta] if delta else []

    def _image_progress(self, done: int) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        if self._report_every and done % self._report_every == 0:
            outputs.append(ImageProgress(done, self._length))
        if done in self._preview_at and self._codes is not None and done < self._length:
            outputs.append(ImageCodes(list(self._codes), self._length, self._began))
        return outputs

    def _stop_token(self, token: int, score: Logprob | None) -> TextDelta:
        """The stop id, which has no text, as the token that ends the log-probabilities (as in vLLM)."""
        top = tuple((id, self._tokenizer.surface(id), value) for id, value in score.top) if score else ()
        return TextDelta("", (Token(token, b"", self._stream.length, score.value if score else None, top),))

    def _finished(self, reason: str) -> Finished:
        count = TokenCount(self.text_tokens, self.image_tokens)
        return Finished("length" if reason == "length" else "stop", count)
