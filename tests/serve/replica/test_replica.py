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
from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
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
    Token,
    TokenCount,
)
from calumma.serve.replica.engine.client import Admitted, Answered, ImageCodes, Texts
from calumma.serve.replica.replica import EngineReplica

from ..conftest import CONTEXT

T = TypeVar("T")
PROMPT = Document((Text("Draw a three.", "user"),))


A, THREE = Token(5, b"a ", 0, -1.0), Token(6, b"three: ", 2, -2.0)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 300))


def params(seed: int, mode: Any = "interleaved", **fields: Any) -> SamplingParams:
    free = PhaseSampling(1.5, 1.0)
    return SamplingParams(mode=mode, seed=seed, text=free, image=free, **fields)


async def output_of(replica: EngineReplica, request: GenerationRequest) -> list[OutputEvent]:
    async with aclosing(replica.generate(request)) as events:
        return [event async for event in events]


def parts(output: list[OutputEvent]) -> list[str | tuple[int, ...]]:
    """Text, and images as pixels, with adjacent texts joined."""
    found: list[Any] = []
    for event in output:
        if isinstance(event, ImageOutput):
            found.append(tuple(PILImage.open(io.BytesIO(event.png)).convert("RGB").tobytes()))
        elif isinstance(event, TextDelta):
            if found and isinstance(found[-1], str):
                found[-1] += event.text
            else:
                found.append(event.text)
    return found


def test_what_is_streamed_is_what_the_engine_generates(replica: EngineReplica, model: MixedModalModel) -> None:
    prompts = [Document((Text(text, "user"),)) for text in ("Draw a three.", "seven", "Count from two to four.")] * 4
    each = [params(seed, max_tokens=60) for seed in range(len(prompts))]

    async def all_at_once() -> list[list[OutputEvent]]:
        requests = [
            GenerationRequest(str(k), p, s, max_tokens=60) for k, (p, s) in enumerate(zip(prompts, each, strict=True))
        ]
        return await asyncio.gather(*(output_of(replica, request) for request in requests))

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
    told = run(output_of(replica, GenerationRequest("p", PROMPT, params(1, "image"), progress=True)))
    assert any(isinstance(event, ImageProgress) for event in told)
    silent = run(output_of(replica, GenerationRequest("q", PROMPT, params(1, "image"))))
    assert not any(isinstance(event, ImageProgress) for event in silent)


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
            TextDelta("a ", (A,)),
            Answered((5,)),
            Texts(TextDelta("three: ", (THREE,)), 3),
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
    assert before == EventBatch([TextDelta("a three: ", (A, THREE))], (5, 6, 7), 4)
    image, *rest = after.events
    assert isinstance(image, ImageOutput)
    assert rest == [TextDelta("."), Finished("stop", TokenCount())]
    assert (after.tokens, after.count) == ((8,), 2)


def test_a_prompt_too_long_is_refused_and_disturbs_nobody(replica: EngineReplica) -> None:
    async def both() -> tuple[list[OutputEvent], list[OutputEvent]]:
        long = Document((Text("x" * 500, "user"),))
        good = output_of(replica, GenerationRequest("good", PROMPT, params(3, "image")))
        return tuple(await asyncio.gather(good, output_of(replica, GenerationRequest("long", long, params(3)))))  # type: ignore[return-value]

    good, long = run(both())
    assert isinstance(good[-1], Finished)
    (refused,) = long
    assert isinstance(refused, RequestFailed)
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "messages")


def test_an_unreadable_image_is_refused(replica: EngineReplica) -> None:
    (refused,) = run(output_of(replica, GenerationRequest("bad", Document((Image(b"no", role="user"),)), params(0))))
    assert isinstance(refused, RequestFailed)
    assert refused.status == 400


def test_who_leaves_is_forgotten(model: MixedModalModel) -> None:
    replica = EngineReplica(model, max_sequences=1)

    async def leave_then_ask() -> list[OutputEvent]:
        async with aclosing(
            replica.generate(GenerationRequest("left", PROMPT, params(0, "image"), progress=True))
        ) as events:
            async for event in events:
                if isinstance(event, ImageProgress):
                    break
        # The leaver had the only seat: this one is answered only if it was given back.
        return await output_of(replica, GenerationRequest("next", PROMPT, params(1, "image")))

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
    events = run(output_of(replica, GenerationRequest("a", PROMPT, params(0))))
    assert isinstance(events[-1], RequestFailed)
    assert (events[-1].status, events[-1].code) == (500, "engine_failed")
    with pytest.raises(RuntimeError, match="out of memory"):
        replica.check_health()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(replica.describe())
    later = run(output_of(replica, GenerationRequest("b", PROMPT, params(0))))
    assert isinstance(later[-1], RequestFailed), "nobody waits for an engine that has ended"


def test_a_replica_that_shuts_down_says_so(model: MixedModalModel) -> None:
    replica = EngineReplica(model)
    replica.close()
    last = run(output_of(replica, GenerationRequest("a", PROMPT, params(0))))[-1]
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "unavailable")


def test_a_model_without_image_decoder_answers_in_text_and_says_why(model: MixedModalModel) -> None:
    """As imported from Hugging Face, which holds the encoder only."""
    shape = model.image_tokenizer.config.model_copy(update={"decoder": False})
    encoder = DocumentEncoder(model.vocabulary, model.text_tokenizer, ImageTokenizer(shape).eval())
    replica = EngineReplica(MixedModalModel(model.transformer, encoder), max_sequences=4)
    try:
        events = run(output_of(replica, GenerationRequest("free", PROMPT, params(3, max_tokens=40), max_tokens=40)))
        assert isinstance(events[-1], Finished)
        assert events[-1].completion.image == 0
        [refused] = run(output_of(replica, GenerationRequest("image", PROMPT, params(3, "image"))))
        assert isinstance(refused, RequestFailed)
        assert (refused.status, refused.code) == (400, "no_image_output")
        assert "no decoder" in refused.message
        assert "--vqgan" in refused.message
        replica.check_health()
    finally:
        replica.close()


@pytest.mark.parametrize(("beyond", "accepted"), [(0, False), (-1, True)])
def test_ids_of_a_prompt_are_those_of_the_vocabulary(replica: EngineReplica, beyond: int, accepted: bool) -> None:
    token = replica.model.vocabulary.size + beyond
    [first, *_] = run(output_of(replica, GenerationRequest("ids", (token,), params(0, "text"), max_tokens=1)))
    assert isinstance(first, Started) == accepted
    if isinstance(first, RequestFailed):
        assert (first.status, first.param) == (400, "prompt")
        assert f"must lie in 0..{token - 1}; found {token}" in first.message


def test_as_many_requests_may_wait_as_the_settings_say(model: MixedModalModel) -> None:
    """Of all, and of one tenant, whose line is full for it alone."""
    replica = EngineReplica(model, 1, max_queued=4, max_queued_per_key=2)

    async def started(tenant: str, number: int) -> tuple[Any, OutputEvent]:
        asked = GenerationRequest(f"{tenant}{number}", PROMPT, params(0, "text"), 50, tenant=tenant)
        output = replica.generate(asked)
        return output, await anext(output)

    async def fill() -> dict[str, list[str | None]]:
        open_, seen = [], dict[str, list[str | None]]()
        for tenant in ("a", "b", "c"):
            for number in range(4):
                output, first = await started(tenant, number)
                open_.append(output)
                refused = first.message if isinstance(first, RequestFailed) else None
                seen.setdefault(tenant, []).append(refused)
        for output in open_:
            await output.aclose()
        output, first = await started("a", 9)
        await output.aclose()
        assert isinstance(first, Started)
        return seen

    try:
        seen = run(fill())
    finally:
        replica.close()
    own, full = "requests of this API key are in line", "as many requests are in line"
    assert [own in (one or "") for one in seen["a"]] == [False, False, False, True]
    assert seen["b"][:2] == [None, None], "an even part of the whole"
    assert full in (seen["b"][2] or "")
    assert seen["c"][0] is None, "whoever fills it"


def test_prompts_in_line_are_bounded_by_their_tokens(model: MixedModalModel) -> None:
    """Those of who would have no more than an even part find room; and what has ended makes room again."""
    replica = EngineReplica(model, 1, max_queued_tokens=20)
    room = CONTEXT + 20

    async def fill(ids: str) -> list[str]:
        open_, refused = [], []
        for number, tenant in enumerate("aaab"):
            asked = GenerationRequest(f"{ids}{number}", (5,) * (CONTEXT // 2), params(0, "text"), 4, tenant=tenant)
            open_.append(replica.generate(asked))
            if isinstance(first := await anext(open_[-1]), RequestFailed):
                refused.append(f"{tenant}{number}")
                assert (first.status, first.message.split(" are ")[0]) == (429, "as many prompt tokens")
        for output in open_:
            await output.aclose()
        return refused

    try:
        assert 2 * (CONTEXT // 2 + 1) <= room < 3 * (CONTEXT // 2)
        assert run(fill("one")) == ["a2"]
        assert run(fill("two")) == ["a2"], "what has ended has left"
    finally:
        replica.close()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"max_tokens": CONTEXT, "prefix": 0, "logprobs": None, "prompt_logprobs": None}),
        ({"max_tokens": 7, "logprobs": 2}, {"max_tokens": 7, "logprobs": 2, "prompt_logprobs": None}),
        ({"logprobs": 2, "echo": True}, {"logprobs": 2, "prompt_logprobs": 2}),
        ({"begin_with_image": True}, {"prefix": 1}),
    ],
)
def test_what_is_asked_for_reaches_the_engine(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    submitted: list[Request] = []

    def submit(engine_request: Request, request: GenerationRequest, on_output: Any) -> None:
        submitted.append(engine_request)
        on_output(RequestFailed(503, "not now"))

    monkeypatch.setattr(replica.engine, "submit", submit)
    run(output_of(replica, GenerationRequest("a", PROMPT, params(1), **fields)))
    [asked] = [request.params for request in submitted]
    found = {name: getattr(asked, name) for name in expected}
    if "prefix" in found:
        assert set(asked.prefix) <= {replica.model.vocabulary.begin_image}
        found["prefix"] = len(asked.prefix)
    assert found == expected
