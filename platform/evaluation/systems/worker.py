"""One model with its engine: answers prompts and scores texts, many at once, what they begin alike computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from calumma.model.document import Document, Role, Segment, Text
from calumma.platform.evaluation.systems.prompts import Answer, Prompt, Sampling, Score, UnusableSystem
from calumma.platform.evaluation.systems.specification import PictureSampling
from calumma.platform.specification import Tracking

if TYPE_CHECKING:
    from calumma.model.generation import Logprob, Request, SamplingParams
    from calumma.model.vocabulary import Vocabulary

STOP_WINDOW = 48  # tokens at the end of an answer in which its stop texts are looked for
CACHED_CONTEXTS = 4  # times a batch: branches of images, and what prompts begin alike


@dataclass
class _Outcome:
    ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str = "failed"
    error: str | None = None
    seconds: float = 0.0


class ModelWorker:
    """Holds a model; runs in this process or as a Ray actor. Work comes in lists, and so do results, in order."""

    def __init__(
        self,
        model: str,
        tracking: Tracking,
        batch: int,
        threads: int = 0,
        dtype: str | None = None,
        pictures: PictureSampling | None = None,
    ) -> None:
        import torch

        from calumma.model import load
        from calumma.model.generation import Engine
        from calumma.platform.tracking.registry import resolve_model

        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with ExitStack() as stack:
            directory = stack.enter_context(resolve_model(model, tracking))
            try:
                self._model = load(directory, device=device, dtype=getattr(torch, dtype) if dtype else None)
            except (FileNotFoundError, ValueError) as error:
                raise UnusableSystem(f"{model}: {error}") from error
        memory = None
        if device == "cuda":
            from calumma.model.generation.cache.device_memory import CudaMemory, MemoryBudget

            memory = MemoryBudget(CudaMemory(), most=CACHED_CONTEXTS * batch * self.context)
        self._engine = Engine(
            self._model.transformer, self._model.vocabulary, self._model.image_length, batch, memory=memory
        )
        self._numbers = 0
        self._pictures = pictures or PictureSampling()

    def ping(self) -> bool:
        return True

    @property
    def vocabulary(self) -> Vocabulary:
        return self._model.vocabulary

    @property
    def context(self) -> int:
        return self._model.config.context

    def answer(self, prompts: Sequence[Prompt]) -> list[Answer]:
        encoded = [self._encode(prompt) for prompt in prompts]
        requests: list[tuple[list[int], SamplingParams]] = []
        stops: list[tuple[str, ...]] = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            if isinstance(ids, list):
                requests.append((ids, self._params(prompt.sampling)))
                stops.append(prompt.sampling.stop)
        outcomes = iter(self._run(requests, stops))
        return [
            self._answer(prompt, ids, next(outcomes))
            if isinstance(ids, list)
            else Answer(Document(()), finish="failed", error=ids)
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Of each (context, continuation), as lm-evaluation-harness divides them into tokens: those that the text of
        both has beyond the context's own. Contexts too long lose their front."""
        tokenizer, bos = self._model.text_tokenizer, self._model.vocabulary.bos
        items = []
        for context, continuation in pairs:
            before = tokenizer.encode(context) if context else []
            own = tokenizer.encode(context + continuation)[len(before) :]
            items.append(([bos, *before], own))
        return self.score_ids(items)

    def score_whole(self, texts: Sequence[str]) -> list[Score]:
        """Of each text; one longer than the context in windows that follow each other, each after the last token of the
        one before, as lm-evaluation-harness takes them."""
        bos, room = self._model.vocabulary.bos, self.context - 1
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for text in texts:
            ids = self._model.text_tokenizer.encode(text)
            own = [([bos], ids[:room])] if ids else []
            for start in range(room, len(ids), room):
                end = min(start + room, len(ids))
                own.append((ids[end - room - 1 : start], ids[start:end]))
            windows += own
            counts.append(len(own))
        scores = iter(self.score_ids(windows))
        result = []
        for count in counts:
            parts = [next(scores) for _ in range(count)]
            result.append(
                Score(sum(p.value for p in parts), sum(p.tokens for p in parts), all(p.greedy for p in parts))
            )
        return result

    def score_ids(self, items: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Of each (ids before, ids to score). Raises UnusableSystem where the model's logits are no numbers."""
        from calumma.model.generation import SamplingParams

        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        prompts = []
        for before, own in items:
            ids = [*before, *own][-self.context :]
            prompts.append((ids, min(len(own), len(ids) - 1)))
        wanted = [(ids, params) for ids, count in prompts if count > 0]
        outcomes = iter(self._run(wanted, [()] * len(wanted)))
        scores = []
        for ids, count in prompts:
            if count <= 0:
                scores.append(Score(0.0, 0, True))
                continue
            outcome = next(outcomes)
            if outcome.error is not None:
                raise UnusableSystem(f"a text of {len(ids)} tokens could not be scored: {outcome.error}")
            scored = outcome.logprobs[-count:]
            likeliest = all(entry.top[0][0] == token for entry, token in zip(scored, ids[-count:], strict=True))
            scores.append(Score(sum(entry.value for entry in scored), count, likeliest, len(ids) - count))
        return scores

    def _encode(self, prompt: Prompt) -> list[int] | str:
        """A prompt's ids, or why it has none."""
        try:
            ids = self._model.encoder.encode(prompt.document, complete=False).ids
        except ValueError as error:  # UnreadableImage
            return str(error)
        room = self.context - prompt.sampling.max_tokens
        if prompt.sampling.cut_front and len(ids) > room > 1:
            ids = [ids[0], *ids[1 - room :]]
        return ids

    def _params(self, sampling: Sampling) -> SamplingParams:
        from calumma.model.answering import supported_params
        from calumma.model.generation import PhaseSampling, SamplingParams

        drawn = (self._model.image_length + 2) * sampling.max_images if sampling.mode == "interleaved" else 0
        params = SamplingParams(
            mode=sampling.mode,
            max_tokens=sampling.max_tokens + drawn,
            max_images=sampling.max_images,
            text=PhaseSampling(temperature=sampling.temperature, top_p=sampling.top_p),
            image=PhaseSampling(temperature=self._pictures.temperature, top_p=self._pictures.top_p),
            guidance_text=self._pictures.guidance_text,
            guidance_image=self._pictures.guidance_image,
            seed=sampling.seed % 2**63,
        )
        return supported_params(params, self._model)

    def _answer(self, prompt: Prompt, ids: list[int], outcome: _Outcome) -> Answer:
        codes = self._model.vocabulary.code_of
        images = sum(token in codes for token in outcome.ids)
        role: Role | None = "assistant" if prompt.document.is_conversation else None
        document = self._model.encoder.decode(outcome.ids, role=role) if outcome.error is None else Document(())
        if prompt.sampling.stop:
            document = cut_at_stops(document, prompt.sampling.stop)
        return Answer(
            document, len(ids), len(outcome.ids) - images, images, outcome.seconds, outcome.finish, outcome.error
        )

    def _run(
        self, requests: Sequence[tuple[list[int], SamplingParams]], stops: Sequence[tuple[str, ...]]
    ) -> list[_Outcome]:
        """All requests through the engine, to their ends."""
        from calumma.model.generation import Request

        begin = time.monotonic()
        outcomes: list[_Outcome] = []
        waiting: dict[str, tuple[_Outcome, Callable[[list[int]], bool]]] = {}
        for (ids, params), texts in zip(requests, stops, strict=True):
            outcome = _Outcome()
            outcomes.append(outcome)
            self._numbers += 1
            request: Request = Request(str(self._numbers), ids, params)
            try:
                self._engine.add(request)
            except ValueError as error:  # PromptTooLong
                outcome.error = str(error)
                continue
            waiting[request.id] = outcome, self._stopper(texts)
        while self._engine.has_work:
            for event in self._engine.step():
                if event.request_id not in waiting:
                    continue
                outcome, stopped = waiting[event.request_id]
                outcome.ids += event.tokens
                outcome.logprobs += event.prompt_logprobs or []
                if event.finish is None and event.phase == "text" and stopped(outcome.ids):
                    self._engine.abort(event.request_id)
                    outcome.finish = "stop"
                elif event.finish is None:
                    continue
                elif event.finish == "failed" and event.failure is not None:
                    outcome.error = event.failure.message
                else:
                    outcome.finish = event.finish
                outcome.seconds = time.monotonic() - begin
                del waiting[event.request_id]
        return outcomes

    def _stopper(self, texts: tuple[str, ...]) -> Callable[[list[int]], bool]:
        """Whether an answer's end holds one of these texts."""
        if not texts:
            return lambda ids: False
        decode = self._model.text_tokenizer.decode
        codes = self._model.vocabulary.code_of

        def stopped(ids: list[int]) -> bool:
            end = decode([token for token in ids[-STOP_WINDOW:] if token not in codes])
            return any(text in end for text in texts)

        return stopped


def cut_at_stops(document: Document, stops: Sequence[str]) -> Document:
    """The document before the first of these texts."""
    kept: list[Segment] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            places = [place for stop in stops if (place := segment.text.find(stop)) >= 0]
            if places:
                if text := segment.text[: min(places)]:
                    kept.append(replace(segment, text=text))
                break
        kept.append(segment)
    return replace(document, segments=tuple(kept))
