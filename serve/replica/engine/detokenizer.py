"""From the engine's tokens of one request to text and codes of images."""

from __future__ import annotations

import time
from typing import Protocol

from calumma.model.generation import Event, Logprob
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.serve.protocol import Finished, GenerationRequest, ImageProgress, TextDelta, Token, TokenCount
from calumma.serve.replica.engine.client import EngineOutput, ImageCodes, OnOutput, PromptLogprobs
from calumma.serve.replica.text_stream import TextStream, TopLogprobs

PROGRESS_STEPS = 16  # reports of one image's progress


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
    images."""

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
        self._report_every = max(1, model.image_length // PROGRESS_STEPS) if request.progress else 0
        self._preview_at = {(k + 1) * self._length // (request.previews + 1) for k in range(request.previews)}

    def process(self, event: Event) -> list[EngineOutput]:
        """The outputs of an event of the engine; a stop string ends them early with Finished."""
        outputs: list[EngineOutput] = [] if event.prompt_logprobs is None else [PromptLogprobs(event.prompt_logprobs)]
        for i, token in enumerate(event.tokens):
            logprob = event.logprobs[i] if i < len(event.logprobs) else None
            top = event.top_logprobs[i] if i < len(event.top_logprobs) else ()
            outputs += self._push(token, logprob, tuple((id, self._tokenizer.surface(id), value) for id, value in top))
            if self._stream.stopped:
                return [*outputs, self._finished("stop")]
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
        delta = self._stream.push(token, surface, logprob, top)
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
