"""An engine replica answers many at once, forgets those who leave, and tells when it is broken."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import pytest
from PIL import Image as PILImage

from calumma.model import MixedModalModel, generate
from calumma.model.document import Document, Image, Text
from calumma.model.encoding import DocumentEncoder
from calumma.model.generation import Engine, PhaseSampling, SamplingParams
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.serve.protocol import (
    EventBatch,
    Finished,
    GenerationRequest,
    ImageOutput,
    ImageProgress,
    OutputEvent,
    RequestFailed,
    Started,
    TextDelta,
    TokenCount,
)
from calumma.serve.replica.engine.client import Admitted, Answered, ImageCodes
from calumma.serve.replica.replica import EngineReplica

T = TypeVar("T")
PROMPT = Document((Text("Draw a three.", "user"),))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 300))


def params(seed: int, mode: Any = "interleaved", **fields: Any) -> SamplingParams:
    free = PhaseSampling(1.5, 1.0)
    return SamplingParams(mode=mode, seed=seed, text=free, image=free, **fields)


async def pieces_of(replica: EngineReplica, job: GenerationRequest) -> list[OutputEvent]:
    async with aclosing(replica.generate(job)) as pieces:
        return [piece async for piece in pieces]


def parts(pieces: list[OutputEvent]) -> list[str | tuple[int, ...]]:
    """Text, and images as pixels, with adjacent texts joined."""
    found: list[Any] = []
    for piece in pieces:
        if isinstance(piece, ImageOutput):
            found.append(tuple(PILImage.open(io.BytesIO(piece.png)).convert("RGB").tobytes()))
        elif isinstance(piece, TextDelta):
            if found and isinstance(found[-1], str):
                found[-1] += piece.text
            else:
                found.append(piece.text)
    return found


def test_what_is_streamed_is_what_the_engine_generates(replica: EngineReplica, model: MixedModalModel) -> None:
    prompts = [Document((Text(text, "user"),)) for text in ("Draw a three.", "seven", "Count from two to four.")] * 4
    each = [params(seed, max_tokens=60) for seed in range(len(prompts))]

    async def all_at_once() -> list[list[OutputEvent]]:
        jobs = [
            GenerationRequest(str(k), p, s, max_tokens=60) for k, (p, s) in enumerate(zip(prompts, each, strict=True))
        ]
        return await asyncio.gather(*(pieces_of(replica, job) for job in jobs))

    answers = run(all_at_once())
    expected = generate(model, prompts, each)
    seen = [
        [s.text if isinstance(s, Text) else tuple(s.open().tobytes()) for s in document.segments]
        for document in expected
    ]
    assert [parts(answer) for answer in answers] == seen
    assert any(isinstance(part, tuple) for answer in seen for part in answer), "some answer should hold an image"
    for answer in answers:
        assert isinstance(answer[0], Started)
        assert isinstance(answer[-1], Finished)


def test_progress_is_told_when_asked(replica: EngineReplica) -> None:
    told = run(pieces_of(replica, GenerationRequest("p", PROMPT, params(1, "image"), progress=True)))
    assert any(isinstance(piece, ImageProgress) for piece in told)
    silent = run(pieces_of(replica, GenerationRequest("q", PROMPT, params(1, "image"))))
    assert not any(isinstance(piece, ImageProgress) for piece in silent)


def test_what_comes_together_travels_together_and_text_does_not_wait_for_the_image_after_it(
    model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Coder:
        def __init__(self) -> None:
            self.may = asyncio.Event()

        async def encode(self, images: Any) -> list[list[int]]:
            return []

        async def decode(self, codes: Any) -> bytes:
            await self.may.wait()
            return b"png"

    async def read() -> list[EventBatch]:
        replica = EngineReplica(model, coder=(coder := Coder()))
        said = [
            Admitted(),
            TextDelta("a "),
            Answered((5,)),
            TextDelta("three: "),
            Answered((6, 7)),
            ImageCodes([1], 1, 0.0),
            TextDelta("."),
            Answered((8,)),
            Finished("stop", TokenCount()),
        ]
        monkeypatch.setattr(
            replica.engine, "submit", lambda engine_request, request, on_output: [on_output(one) for one in said]
        )
        found = []
        try:
            async with aclosing(replica.generate_batches(GenerationRequest("a", PROMPT, params(0)))) as batches:
                async for batch in batches:
                    found.append(batch)
                    if len(found) == 2:
                        coder.may.set()
        finally:
            replica.close()
        return found

    started, before, after = run(read())
    assert isinstance(started.events[0], Started)
    assert before == EventBatch([TextDelta("a three: ")], (5, 6, 7), 2)
    image, *rest = after.events
    assert isinstance(image, ImageOutput)
    assert rest == [TextDelta("."), Finished("stop", TokenCount())]
    assert (after.tokens, after.count) == ((8,), 2)


def test_a_prompt_too_long_is_refused_and_disturbs_nobody(replica: EngineReplica) -> None:
    async def both() -> tuple[list[OutputEvent], list[OutputEvent]]:
        long = Document((Text("x" * 500, "user"),))
        good = pieces_of(replica, GenerationRequest("good", PROMPT, params(3, "image")))
        return tuple(await asyncio.gather(good, pieces_of(replica, GenerationRequest("long", long, params(3)))))  # type: ignore[return-value]

    good, long = run(both())
    assert isinstance(good[-1], Finished)
    (refused,) = long
    assert isinstance(refused, RequestFailed)
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "messages")


def test_an_unreadable_image_is_refused(replica: EngineReplica) -> None:
    (refused,) = run(pieces_of(replica, GenerationRequest("bad", Document((Image(b"no", role="user"),)), params(0))))
    assert isinstance(refused, RequestFailed)
    assert refused.status == 400


def test_who_leaves_is_forgotten(model: MixedModalModel) -> None:
    replica = EngineReplica(model, max_sequences=1)

    async def leave_then_ask() -> list[OutputEvent]:
        async with aclosing(
            replica.generate(GenerationRequest("left", PROMPT, params(0, "image"), progress=True))
        ) as pieces:
            async for piece in pieces:
                if isinstance(piece, ImageProgress):
                    break
        # The leaver had the only seat: this one is answered only if it was given back.
        return await pieces_of(replica, GenerationRequest("next", PROMPT, params(1, "image")))

    try:
        assert isinstance(run(leave_then_ask())[-1], Finished)
        assert replica.engine.running == 0
    finally:
        replica.close()


def test_a_broken_engine_fails_its_requests_and_its_health(
    model: MixedModalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = EngineReplica(model)
    replica.check_health()

    def step(engine: Engine) -> AsyncIterator[Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "step", step)
    pieces = run(pieces_of(replica, GenerationRequest("a", PROMPT, params(0))))
    assert isinstance(pieces[-1], RequestFailed)
    assert (pieces[-1].status, pieces[-1].code) == (500, "engine_failed")
    with pytest.raises(RuntimeError, match="out of memory"):
        replica.check_health()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(replica.describe())
    later = run(pieces_of(replica, GenerationRequest("b", PROMPT, params(0))))
    assert isinstance(later[-1], RequestFailed), "nobody waits for an engine that has ended"


def test_a_replica_that_shuts_down_says_so(model: MixedModalModel) -> None:
    replica = EngineReplica(model)
    replica.close()
    last = run(pieces_of(replica, GenerationRequest("a", PROMPT, params(0))))[-1]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "unavailable")


def test_a_model_without_image_decoder_answers_in_text_and_says_why(model: MixedModalModel) -> None:
    """As imported from Hugging Face, which holds the encoder only."""
    shape = model.image_tokenizer.config.model_copy(update={"decoder": False})
    encoder = DocumentEncoder(model.vocabulary, model.text_tokenizer, ImageTokenizer(shape).eval())
    replica = EngineReplica(MixedModalModel(model.transformer, encoder), max_sequences=4)
    try:
        pieces = run(pieces_of(replica, GenerationRequest("free", PROMPT, params(3, max_tokens=40), max_tokens=40)))
        assert isinstance(pieces[-1], Finished)
        assert pieces[-1].completion.image == 0
        [refused] = run(pieces_of(replica, GenerationRequest("image", PROMPT, params(3, "image"))))
        assert isinstance(refused, RequestFailed)
        assert (refused.status, refused.code) == (400, "no_image_output")
        assert "no decoder" in refused.message
        assert "--vqgan" in refused.message
        replica.check_health()
    finally:
        replica.close()
