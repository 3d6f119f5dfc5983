"""An engine replica: one model, one engine, and as many clients as come.

Requests of all clients share every step (continuous batching); each gets its text token by token and an image as
soon as it is decoded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calumma.model import MixedModalModel, load
from calumma.model.answering import supported_params
from calumma.model.config import ModelConfig
from calumma.model.document import Document
from calumma.model.generation import Request, SamplingParams
from calumma.model.generation.request import Logprob
from calumma.model.tokenizers.image import MissingDecoder
from calumma.model.transformer import Transformer
from calumma.serve.coding import ImageCoder, LocalCoder, PromptEncoder
from calumma.serve.engine_process import EngineProcess
from calumma.serve.loop import Codes, EngineLoop, Loop, Part, Scored, Taken
from calumma.serve.mailbox import Mailbox
from calumma.serve.pieces import Drawing, Finished, ImagePiece, Job, Piece, Refused, Started, TextPiece, TokenCount
from calumma.serve.ranks import Ranks, precision
from calumma.serve.settings import ModelSettings
from calumma.serve.text import TextStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

# How the special ids are spelled towards clients that need a name for them (lm-evaluation-harness).
BOS, EOS = "<s>", "</s>"
TELLING = 10.0  # seconds, at most, until the streams of an engine that failed have said so
LINGER = 0.5  # seconds until what they said is on its way
# A message costs the processes it passes some milliseconds together. So an answer's texts within some time travel as
# one, the longer the more answers there are: least seconds, most seconds, and messages a second in all.
SOONEST, LATEST, MESSAGES = 0.04, 0.25, 100.0


class EngineReplica:
    """A `Backend` in this process: encodes prompts, hands them to the engine, streams pieces back."""

    def __init__(
        self,
        model: MixedModalModel,
        max_sequences: int = 16,
        max_queued: int = 256,
        coder: ImageCoder | None = None,
        loop: Loop | None = None,
        device: str | None = None,
        **engine: Any,
    ) -> None:
        """loop: an engine at work with this model, on `device`; else one is made here, on a thread, with further
        options."""
        self.model = model
        self._parameters = sum(p.numel() for p in model.transformer.parameters())
        self.device = device or str(model.device)
        self.max_sequences, self.max_queued = max_sequences, max_queued
        self._encoder = PromptEncoder(model.vocabulary, model.text_tokenizer, model.image_tokenizer)
        self._own_coder = LocalCoder(self._encoder) if coder is None else None
        self.coder: ImageCoder = coder or self._own_coder  # type: ignore[assignment]
        self.loop = loop or EngineLoop(model, max_sequences, **engine)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; Started or Refused is the first. Closing the generator abandons the job."""
        async with aclosing(self.batches(job)) as batches:
            async for pieces in batches:
                for piece in pieces:
                    yield piece

    async def batches(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        """`generate`, with what is there at a time together."""
        if self.loop.waiting >= self.max_queued:
            message = f"{self.max_queued} requests are in line already; try again shortly"
            yield [Refused(429, message, code="overloaded")]
            return
        try:
            asked = supported_params(job.params, self.model)
        except MissingDecoder as error:
            yield [Refused(400, str(error), code="no_image_output")]
            return
        mailbox: Mailbox[Part] = Mailbox((TextPiece, Drawing))
        try:
            tokens = await self._encode(job.prompt)
            if job.max_tokens == 0 and not (job.echo and job.logprobs is not None):
                yield [Started(self._count(tokens), self._echo(job, tokens, None)), Finished("length", TokenCount())]
                return
            request = Request(job.id, tokens, self._params(job, asked))
        except ValueError as error:
            yield [Refused(400, str(error), param=job.param)]
            return
        ended = False
        try:
            self.loop.submit(request, job, mailbox.post)
            first, *parts = await mailbox.take()
            scored: list[Logprob] | None = None
            if isinstance(first, Taken) and request.params.prompt_logprobs is not None:  # they come next
                first, *parts = parts or await mailbox.take()
                if isinstance(first, Scored):
                    scored = first.values
                elif not isinstance(first, Refused):
                    raise AssertionError(f"{type(first).__name__} came before the prompt's scores")
            if isinstance(first, Refused):
                ended = True
                yield [dataclasses.replace(first, param=job.param) if first.status == 400 else first]
                return
            yield [Started(self._count(tokens), self._echo(job, tokens, scored))]
            clock = asyncio.get_running_loop()
            due = 0.0
            while not ended:
                parts = parts or await mailbox.take(due)
                due = clock.time() + min(LATEST, max(SOONEST, self.loop.running / MESSAGES))
                ended = isinstance(parts[-1], Finished | Refused)
                async for pieces in self._pieces(_merged(parts)):
                    yield pieces
                parts = []
        finally:
            if not ended:
                self.loop.abandon(job.id)

    async def _pieces(self, parts: list[Part]) -> AsyncGenerator[list[Piece], None]:
        """The parts with their codes decoded; what stands before an image does not wait for it."""
        ready: list[Piece] = []
        for part in parts:
            if isinstance(part, Codes) and ready:
                yield ready
                ready = []
            ready.append(await self._finished(part))
        yield ready

    def _params(self, job: Job, asked: SamplingParams) -> SamplingParams:
        """The job's parameters as the engine takes them."""
        begin_image = job.begin_with_image and asked.mode == "interleaved"
        return dataclasses.replace(
            asked,
            max_tokens=self.model.config.context if job.max_tokens is None else job.max_tokens,
            prefix=(self.model.vocabulary.begin_image,) if begin_image else (),
            logprobs=job.logprobs,
            prompt_logprobs=job.logprobs if job.echo else None,
        )

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
            "running": self.loop.running,
        }

    async def statistics(self) -> dict[str, dict[str, float]]:
        """Numbers of this replica."""
        return {"local": self.loop.statistics()}

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; the names of bos and eos alone stand for those ids."""
        special = {BOS: self.model.vocabulary.bos, EOS: self.model.vocabulary.eos}
        return [special[text]] if text in special else self.model.text_tokenizer.encode(text)

    async def detokenize(self, ids: list[int]) -> str:
        return self.model.text_tokenizer.decode(ids)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if self.loop.failure is not None:
            raise RuntimeError(f"the engine stopped: {self.loop.failure}") from self.loop.failure

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve for the autoscaling policy (routing.py)."""
        return {"queued_tokens": self.loop.statistics().get("queued_tokens", 0)}

    def close(self) -> None:
        self.loop.close()
        if self._own_coder is not None:
            self._own_coder.close()

    async def _encode(self, prompt: Document | tuple[int, ...]) -> list[int]:
        """Token ids, from bos on. Raises ValueError (UnreadableImage is one)."""
        if not isinstance(prompt, Document):
            bos, size = self.model.vocabulary.bos, self.model.vocabulary.size
            if max(prompt) >= size:
                raise ValueError(f"the prompt's ids must lie in 0..{size - 1}; found {max(prompt)}")
            return list(prompt) if prompt[0] == bos else [bos, *prompt]
        codes = await self.coder.encode(prompt.images)
        return await asyncio.to_thread(self._encoder.ids, prompt, codes)

    def _echo(self, job: Job, tokens: list[int], scored: list[Logprob] | None) -> TextPiece | None:
        """The prompt's text where the job asks for it, with log-probabilities where there are some; without the bos
        that was put before a client's ids or text."""
        if not job.echo:
            return None
        tokenizer = self.model.text_tokenizer
        given = isinstance(job.prompt, tuple) and job.prompt[0] == tokens[0]
        stream = TextStream(tokenizer.stream_decoder(), tokens=scored is not None)
        pieces = []
        for at in range(0 if given else 1, len(tokens)):
            score = scored[at - 1] if scored and at > 0 else None
            top = tuple((i, tokenizer.surface(i), value) for i, value in score.top) if score else ()
            pieces.append(stream.push(tokens[at], tokenizer.surface(tokens[at]), score.value if score else None, top))
        found = [piece for piece in [*pieces, stream.finish()] if piece]
        return TextPiece("".join(p.text for p in found), tuple(token for p in found for token in p.tokens))

    async def _finished(self, part: Part) -> Piece:
        """The part with its codes decoded."""
        if isinstance(part, Taken | Scored):
            raise AssertionError(f"{type(part).__name__} comes before the answer")
        if not isinstance(part, Codes):
            return part
        try:
            png = await self.coder.decode(part.codes)
        except MissingDecoder as error:
            return Refused(400, str(error), code="no_image_output")
        if len(part.codes) < part.total:
            return Drawing(len(part.codes), part.total, png)
        return ImagePiece(png, time.monotonic() - part.began)

    def _count(self, tokens: list[int]) -> TokenCount:
        vocabulary = self.model.vocabulary
        image = sum(t in vocabulary.code_of or t in (vocabulary.begin_image, vocabulary.end_image) for t in tokens)
        return TokenCount(len(tokens) - image, image)


def _merged(parts: list[Part]) -> list[Part]:
    """Adjacent texts as one, and of adjacent reports on an image the last."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, TextPiece) and isinstance(last, TextPiece):
            found[-1] = TextPiece(last.text + part.text, last.tokens + part.tokens)
        elif isinstance(part, Drawing) and isinstance(last, Drawing):
            found[-1] = part
        else:
            found.append(part)
    return found


class Replica(EngineReplica):
    """The Ray Serve deployment: an engine, in a process of its own, for the model directory at `source` (a path or
    s3://…)."""

    def __init__(self, settings: ModelSettings, source: str, coders: DeploymentHandle | None = None) -> None:
        from calumma.platform.cluster import capacity
        from calumma.platform.tracking import registry
        from calumma.serve.coding import RemoteCoder

        processes = settings.min_replicas * settings.tensor_parallel
        threads = settings.threads or max(1, capacity.cores() // processes)
        torch.set_num_threads(threads)
        self._ranks: Ranks | None = None
        with registry.resolve_model(source, settings.tracking) as directory:
            if settings.tensor_parallel == 1:
                engine = EngineProcess(settings, directory, threads)
            else:
                self._ranks = Ranks(settings, directory, threads)
                engine = EngineProcess(settings, directory, threads, self._ranks.meeting, self._ranks.cause)
                self._ranks.watch(engine.fail)
            try:
                model = load(directory, precision(settings)[0], read=described)
                engine.started()
            except Exception as error:
                engine.fail(error)
                if self._ranks is not None:
                    self._ranks.abandon()
                raise
        coder = None if coders is None else RemoteCoder(coders)
        super().__init__(model, settings.max_sequences, settings.max_queued, coder, engine, precision(settings)[0])
        self._streams = 0
        threading.Thread(target=self._end_with, args=(engine,), daemon=True).start()

    async def batches(self, job: Job) -> AsyncGenerator[list[Piece], None]:
        self._streams += 1
        try:
            async with aclosing(super().batches(job)) as batches:
                async for pieces in batches:
                    yield pieces
        finally:
            self._streams -= 1

    def _end_with(self, engine: EngineProcess) -> None:
        """End when the engine has failed and its streams are told: Ray Serve replaces what is gone at once, but would
        look three times at what is not well, and send it requests meanwhile."""
        if engine.ended() is None:
            return
        end = time.monotonic() + TELLING
        while self._streams and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(LINGER)
        os._exit(1)

    def close(self) -> None:
        super().close()
        if self._ranks is not None:
            if self.loop.failure is None:
                self._ranks.close()
            else:
                self._ranks.abandon()

    def __del__(self) -> None:
        """Called by Ray Serve when the replica has answered what it had begun."""
        if hasattr(self, "loop"):
            self.close()

    async def statistics(self) -> dict[str, dict[str, float]]:
        from ray import serve

        return {serve.get_replica_context().replica_id.unique_id: self.loop.statistics()}


def described(directory: Path, *_: Any) -> Transformer:
    """The Transformer without its weights: they are in the engine's process."""
    with torch.device("meta"):
        return Transformer(ModelConfig.read(directory))
