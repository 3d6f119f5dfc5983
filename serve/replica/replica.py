"""An engine replica: one model, one engine, and as many clients as come.

Requests of all clients share every step (continuous batching); each gets its text token by token and an image as
soon as it is decoded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from calumma.model import MixedModalModel
from calumma.model.answering import supported_params
from calumma.model.document import Document
from calumma.model.generation import Request, SamplingParams
from calumma.model.generation.request import Logprob
from calumma.model.tokenizers.image import MissingDecoder
from calumma.serve.protocol import (
    BOS,
    EOS,
    FINAL_EVENTS,
    OVERLOADED,
    EventBatch,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    OutputStream,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.replica.engine.client import (
    NOT_URGENT,
    Admitted,
    Answered,
    EngineClient,
    EngineOutput,
    ImageCodes,
    PromptLogprobs,
    Texts,
)
from calumma.serve.replica.engine.thread import EngineThread
from calumma.serve.replica.image_coder import ImageCoder, LocalImageCoder, PromptEncoder
from calumma.serve.replica.image_codes import ImageCodeCache
from calumma.serve.replica.mailbox import Mailbox
from calumma.serve.replica.text_stream import TextStream
from calumma.serve.shares import Shares

# A message costs the processes it passes some milliseconds together. So the texts of an output within some time travel
# as one message, the longer the more requests run: least and most seconds between messages, and messages a second in
# all.
MIN_INTERVAL, MAX_INTERVAL, MESSAGES_PER_SECOND = 0.04, 0.25, 100.0


class UnknownTokenId(ValueError):
    """param: the HTTP request's field that has it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class EngineReplica:
    """A `Backend` in this process: encodes prompts, submits them to the engine, streams its outputs with images
    decoded."""

    def __init__(
        self,
        model: MixedModalModel,
        max_sequences: int = 16,
        max_queued: int = 256,
        coder: ImageCoder | None = None,
        engine: EngineClient | None = None,
        device: str | None = None,
        max_queued_per_key: int | None = None,
        max_queued_tokens: int = 2**22,
        **options: Any,
    ) -> None:
        """engine: a running one with this model, on `device`; else one is made here, on a thread, with `options`."""
        self.model = model
        self._parameters = sum(p.numel() for p in model.transformer.parameters())
        self.device = device or str(model.device)
        self.max_sequences, self.max_queued_per_key = max_sequences, max_queued_per_key or max(1, max_queued * 3 // 4)
        self._line = Shares(max_sequences + max_queued)  # answers that run or wait
        self._prompts = Shares(max_sequences * model.config.context + max_queued_tokens)  # their tokens
        self._encoder = PromptEncoder(model.vocabulary, model.text_tokenizer, model.image_tokenizer)
        self._own_coder = LocalImageCoder(self._encoder) if coder is None else None
        self.coder: ImageCoder = coder or self._own_coder  # type: ignore[assignment]
        self._image_codes = ImageCodeCache()
        self.engine = engine or EngineThread(model, max_sequences, **options)

    async def generate(self, request: GenerationRequest) -> OutputStream:
        """The output as it comes; Started or RequestFailed is the first event. Closing the generator aborts it."""
        async with aclosing(self.generate_batches(request)) as batches:
            async for batch in batches:
                for event in batch.events:
                    yield event

    async def generate_batches(self, request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        """`generate`, with the events that are there at a time together, and the ids from which another replica could
        continue the answer."""
        if request.continuation is None and (full := self._line.full(request.tenant, 1, self._line_of_one(request))):
            yield _line_is_full("requests of this API key" if full == "tenant" else "requests")
            return
        self._line.take(request.tenant)
        try:
            async with aclosing(self._answer(request)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._line.give_back(request.tenant)

    def _line_of_one(self, request: GenerationRequest) -> int | None:
        """Answers that a tenant may have here, running or in line."""
        return self.max_sequences + self.max_queued_per_key if request.tenant else None

    async def _answer(self, request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        try:
            params = supported_params(request.params, self.model)
        except MissingDecoder as error:
            yield EventBatch([RequestFailed(400, str(error), code="no_image_output")])
            return
        mailbox: Mailbox[EngineOutput] = Mailbox(NOT_URGENT)
        try:
            tokens = await self._encode(request.prompt, request.salt)
            if request.max_tokens == 0 and not (request.echo and request.logprobs is not None):
                started = Started(self._count(tokens), self._echo(request, tokens, None))
                yield EventBatch([started, Finished("length", TokenCount())])
                return
            asked = self._params(request, params)
            engine_request = Request(
                request.id, tokens, asked, request.tenant, request.priority, request.salt, request.adapter
            )
        except ValueError as error:
            param = error.param if isinstance(error, UnknownTokenId) else request.param
            yield EventBatch([RequestFailed(400, str(error), param=param)])
            return
        if request.continuation is None and self._prompts.full(request.tenant, len(tokens)):
            yield _line_is_full("prompt tokens")
            return
        self._prompts.take(request.tenant, len(tokens))
        ended = False
        try:
            self.engine.submit(engine_request, request, mailbox.post)
            first, *outputs = await mailbox.take()
            scores: list[Logprob] | None = None
            if isinstance(first, Admitted) and engine_request.params.prompt_logprobs is not None:  # they come next
                first, *outputs = outputs or await mailbox.take()
                if isinstance(first, PromptLogprobs):
                    scores = first.values
                elif not isinstance(first, RequestFailed):
                    raise AssertionError(f"{type(first).__name__} came before the prompt's scores")
            if isinstance(first, RequestFailed):
                ended = True
                yield EventBatch(
                    [dataclasses.replace(first, param=first.param or request.param) if first.status == 400 else first]
                )
                return
            yield EventBatch([Started(self._count(tokens), self._echo(request, tokens, scores))])
            clock = asyncio.get_running_loop()
            due = 0.0
            while not ended:
                outputs = outputs or await mailbox.take(due)
                due = clock.time() + min(MAX_INTERVAL, max(MIN_INTERVAL, self.engine.running / MESSAGES_PER_SECOND))
                ended = isinstance(outputs[-1], Finished | RequestFailed)
                async for batch in self._batches(outputs):
                    yield batch
                outputs = []
        finally:
            self._prompts.give_back(request.tenant, len(tokens))
            if not ended:
                self.engine.abort(request.id)

    async def _batches(self, outputs: list[EngineOutput]) -> AsyncGenerator[EventBatch, None]:
        """The outputs as events: images decoded, adjacent texts as one, and of adjacent reports of an image's progress
        the last. What stands before an image does not wait for it."""
        events: list[OutputEvent] = []
        tokens: list[int] = []
        count = 0
        for output in outputs:
            if isinstance(output, Answered):
                tokens += output.tokens
                continue
            if isinstance(output, ImageCodes) and events:
                yield EventBatch(events, tuple(tokens), count)
                events, tokens, count = [], [], 0
            event, last = await self._event(output), events[-1] if events else None
            count += output.count if isinstance(output, Texts) else not isinstance(event, FINAL_EVENTS)
            if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                events[-1] = last + event
            elif isinstance(output, ImageProgress) and isinstance(last, ImageProgress) and last.preview is None:
                events[-1] = output
            else:
                events.append(event)
        if events or tokens:
            yield EventBatch(events, tuple(tokens), count)

    def _params(self, request: GenerationRequest, params: SamplingParams) -> SamplingParams:
        """Sampling parameters of the request as the engine takes them. Raises ValueError on ids that are none."""
        size = self.model.vocabulary.size
        named = {
            "stop_token_ids": params.stop_ids,
            "allowed_token_ids": params.allowed_ids or (),
            "logit_bias": [token for token, _ in params.logit_bias],
        }
        for param, ids in named.items():
            if ids and max(ids) >= size:
                raise UnknownTokenId(f"token ids must lie in 0..{size - 1}; found {max(ids)}", param)
        prefix = request.continuation.tokens if request.continuation else ()
        if not prefix and request.begin_with_image and params.mode == "interleaved":
            prefix = (self.model.vocabulary.begin_image,)
        return dataclasses.replace(
            params,
            max_tokens=self.model.config.context if request.max_tokens is None else request.max_tokens,
            prefix=prefix,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.echo else None,
            bad_words=self._bad_words(request.bad_words),
        )

    def _bad_words(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Their ids at the beginning of a word and, where they are others, within one (as vLLM does)."""
        encode = self.model.text_tokenizer.encode
        found = (tuple(encode(spelled)) for word in words for spelled in (word, " " + word.lstrip()))
        return tuple(dict.fromkeys(ids for ids in found if ids))

    async def describe(self) -> dict[str, Any]:
        """Facts for /health and the playground. Raises when the engine has failed."""
        self.check_health()
        tokenizer = self.model.image_tokenizer
        return {
            "context": self.model.config.context,
            "parameters": self._parameters,
            "image_size": tokenizer.config.resolution,
            "image_tokens": self.model.image_length,
            "image_output": bool(tokenizer.config.decoder),
            "device": self.device,
            "max_sequences": self.max_sequences,
            "running": self.engine.running,
        }

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Of this replica's engine."""
        return {"local": self._statistics()}

    def _statistics(self) -> dict[str, float]:
        """Of its engine, and of the images of its prompts."""
        coded = {"images_coded": self._image_codes.coded, "images_known": self._image_codes.known}
        return {**self.engine.statistics(), **coded}

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; the names of bos and eos alone stand for those ids."""
        special = {BOS: self.model.vocabulary.bos, EOS: self.model.vocabulary.eos}
        return [special[text]] if text in special else self.model.text_tokenizer.encode(text)

    async def detokenize(self, ids: list[int]) -> str:
        """Raises LookupError on an id beyond the vocabulary, which tokenizers leave out or stumble over."""
        if ids and max(ids) >= self.model.vocabulary.size:
            raise LookupError(f"id {max(ids)} is none of the {self.model.vocabulary.size} of the vocabulary")
        return self.model.text_tokenizer.decode(ids)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self.engine.failure is not None:
            raise RuntimeError(f"the engine stopped: {self.engine.failure}") from self.engine.failure

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called beside all requests, by Ray Serve and by deploy/control.py. Raises when the engine has failed."""
        return {"facts": await self.describe(), "statistics": self._statistics()}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve for the autoscaling policy (deploy/scaling.py)."""
        return {"queued_tokens": self.engine.statistics().get("queued_tokens", 0)}

    def close(self) -> None:
        self.engine.close()
        if self._own_coder is not None:
            self._own_coder.close()

    async def _encode(self, prompt: Document | tuple[int, ...], salt: bytes) -> list[int]:
        """Token ids, from bos on. Raises ValueError (UnreadableImage is one)."""
        if not isinstance(prompt, Document):
            bos, size = self.model.vocabulary.bos, self.model.vocabulary.size
            if max(prompt) >= size:
                raise ValueError(f"the prompt's ids must lie in 0..{size - 1}; found {max(prompt)}")
            return list(prompt) if prompt[0] == bos else [bos, *prompt]
        codes = await self._image_codes.encode(prompt.images, salt, self.coder.encode)
        return await asyncio.to_thread(self._encoder.ids, prompt, codes)

    def _echo(self, request: GenerationRequest, tokens: list[int], scores: list[Logprob] | None) -> TextDelta | None:
        """The prompt's text where the request asks for it, with log-probabilities where there are some; without the
        bos that was put before a client's ids or text."""
        if not request.echo:
            return None
        tokenizer = self.model.text_tokenizer
        given_bos = isinstance(request.prompt, tuple) and request.prompt[0] == tokens[0]
        stream = TextStream(tokenizer.stream_decoder(), tokens=scores is not None)
        deltas = []
        for i in range(0 if given_bos else 1, len(tokens)):
            score = scores[i - 1] if scores and i > 0 else None
            top = tuple((id, tokenizer.surface(id), value) for id, value in score.top) if score else ()
            deltas.append(stream.push(tokens[i], tokenizer.surface(tokens[i]), score.value if score else None, top))
        found = [delta for delta in [*deltas, stream.finish()] if delta]
        return TextDelta("".join(delta.text for delta in found), tuple(t for delta in found for t in delta.tokens))

    async def _event(self, output: EngineOutput) -> OutputEvent:
        """The output, with an image's codes decoded."""
        if isinstance(output, Admitted | PromptLogprobs | Answered):
            raise AssertionError(f"{type(output).__name__} comes before the output")
        if isinstance(output, Texts):
            return output.delta
        if not isinstance(output, ImageCodes):
            return output
        try:
            png = await self.coder.decode(output.codes)
        except MissingDecoder as error:
            return RequestFailed(400, str(error), code="no_image_output")
        if len(output.codes) < output.total:
            return ImageProgress(len(output.codes), output.total, png)
        return ImageOutput(png, time.monotonic() - output.began)

    def _count(self, tokens: list[int]) -> TokenCount:
        vocabulary = self.model.vocabulary
        image = sum(t in vocabulary.code_of or t in (vocabulary.begin_image, vocabulary.end_image) for t in tokens)
        return TokenCount(len(tokens) - image, image)


def _line_is_full(what: str) -> EventBatch:
    message = f"as many {what} are in line already as may be; try again shortly"
    return EventBatch([RequestFailed(429, message, code=OVERLOADED)])
