"""An output whose replicas die is what it would have been, whenever they do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model import MixedModalModel
from calumma.model.document import Document, Text
from calumma.model.generation import Event, PhaseSampling, Request, SamplingParams
from calumma.serve.deploy import continuation
from calumma.serve.deploy.continuation import ATTEMPTS, ReplicaLost, ReplicasBusy, unbroken
from calumma.serve.protocol import (
    Continuation,
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
from calumma.serve.replica import replica as replica_module
from calumma.serve.replica.engine.client import Admitted, OnOutput
from calumma.serve.replica.engine.detokenizer import Detokenizer
from calumma.serve.replica.replica import EngineReplica

PATIENCE = 300
PROMPT = Document((Text("Draw a three.", "user"),))
STARTED, FINISHED = Started(TokenCount(3)), Finished("stop", TokenCount(1))


@dataclass(frozen=True)
class Output:
    """What a client gets in the end: texts and images in order, previews, tokens with their log-probabilities."""

    started: list[OutputEvent]
    parts: list[str | bytes] = field(default_factory=list)
    previews: list[tuple[int, bytes]] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    last: OutputEvent | None = None


def output_of(events: Sequence[OutputEvent]) -> Output:
    output = Output([event for event in events if isinstance(event, Started)], last=events[-1])
    done = 0
    for event in events:
        match event:
            case TextDelta(text, tokens):
                output.tokens.extend(tokens)
                if output.parts and isinstance(output.parts[-1], str):
                    output.parts[-1] += text
                elif text:
                    output.parts.append(text)
            case ImageOutput(png):
                output.parts.append(png)
                done = 0
            case ImageProgress(codes, _, preview):
                assert codes >= done, "an image never goes back"
                done = codes
                if preview:
                    output.previews.append((codes, preview))
    return output


Ask = Callable[[GenerationRequest], AsyncGenerator[EventBatch, None]]


async def heard(request: GenerationRequest, ask: Ask) -> list[OutputEvent]:
    async with aclosing(unbroken(request, ask)) as events:
        return [event async for event in events]


def run(request: GenerationRequest, ask: Ask) -> list[OutputEvent]:
    return asyncio.run(asyncio.wait_for(heard(request, ask), PATIENCE))


def dying(replica: EngineReplica, lives: Iterator[int | None]) -> Ask:
    """Replicas that die one after the other, each after so many batches; None lives on. Every other one can still tell
    that it does."""
    dead = itertools.count()

    async def ask(request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        life = next(lives, None)
        async with aclosing(replica.generate_batches(request)) as batches:
            count = 0
            while count != life:
                try:
                    batch = await anext(batches)
                except StopAsyncIteration:
                    return
                count += 1
                yield batch
        if next(dead) % 2:
            yield EventBatch([RequestFailed(503, "killed", code="unavailable")])
        raise ReplicaLost("killed")

    return ask


# ---- replicas with a scripted engine: all that serving does, at every place


class Coder:
    async def encode(self, images: Any) -> list[list[int]]:
        return []

    async def decode(self, codes: Sequence[int]) -> bytes:
        return bytes(codes)


class ScriptedEngine:
    """An `EngineClient` that answers with given ids: whatever they begin with must be the answer's beginning.

    steps: how many ids each step brings, in turn. together: how many outputs are posted before the replica takes them.
    """

    failure: Exception | None = None
    running = waiting = 0

    def __init__(self, model: MixedModalModel, answer: list[int], steps: list[int], together: list[int]) -> None:
        self.model, self.answer, self.steps, self.together = model, answer, steps, together
        self.drawn = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, engine_request: Request, request: GenerationRequest, on_output: OnOutput) -> None:
        given = list(engine_request.params.prefix)
        assert given == self.answer[: len(given)]
        assert engine_request.params.seed is not None
        task = asyncio.create_task(self._post(len(given), request, on_output))
        self._tasks.add(task)

    async def _post(self, given: int, request: GenerationRequest, on_output: OnOutput) -> None:
        outputs = [Admitted()]
        detokenizer = Detokenizer(self.model, request, outputs.append)
        for event in self._events(given):
            outputs += detokenizer.process(event)
            if isinstance(outputs[-1], Finished):
                break
        sizes = itertools.cycle(self.together)
        while outputs:
            for output in [outputs.pop(0) for _ in range(min(next(sizes), len(outputs)))]:
                on_output(output)
            for _ in range(4):
                await asyncio.sleep(0)

    def _events(self, given: int) -> Iterator[Event]:
        begin, sizes = 0, itertools.cycle(self.steps)
        self.drawn += len(self.answer) - given
        while begin < len(self.answer):
            end = begin + (given if begin < given else next(sizes))
            ids = self.answer[begin:end]
            logprobs = [0.0 if place < given else -1.0 - place for place in range(begin, begin + len(ids))]
            for phase, group in itertools.groupby(zip(ids, logprobs, strict=True), lambda pair: self._phase(pair[0])):
                pairs = list(group)
                yield Event("", [id for id, _ in pairs], phase, None, [value for _, value in pairs])
            begin += len(ids)
        yield Event("", [], "text", "stop", [-0.5])

    def _phase(self, id: int) -> Any:
        vocabulary = self.model.vocabulary
        ends = (vocabulary.begin_image, vocabulary.end_image)
        return "image" if id in vocabulary.code_of or id in ends else "text"

    def abort(self, request_id: str) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def statistics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def no_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are as the engine posts them, and nobody waits."""
    monkeypatch.setattr(continuation, "REPLICA_GONE_SECONDS", 0.0)
    monkeypatch.setattr(replica_module, "MIN_INTERVAL", 0.0)
    monkeypatch.setattr(replica_module, "MAX_INTERVAL", 0.0)


def scripted(
    model: MixedModalModel,
    answer: list[int],
    steps: list[int] | None = None,
    together: list[int] | None = None,
) -> tuple[EngineReplica, ScriptedEngine]:
    engine = ScriptedEngine(model, answer, steps or [1], together or [1])
    return EngineReplica(model, coder=Coder(), engine=engine, device="cpu"), engine


def request_of(**fields: Any) -> GenerationRequest:
    return GenerationRequest("r", PROMPT, SamplingParams(100, "interleaved", seed=7), **fields)


def image(model: MixedModalModel, code: int) -> list[int]:
    vocabulary = model.vocabulary
    codes = [vocabulary.image_ids[(code + k) % 16] for k in range(16)]
    return [vocabulary.begin_image, *codes, vocabulary.end_image]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop": {"stop": ("seven日", "xyz")},
    "logprobs": {"logprobs": 0},
    "logprobs and stop": {"logprobs": 0, "stop": ("é seven日",)},
    "previews": {"progress": True, "previews": 3},
    "echo": {"echo": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_die_after_any_batch(model: MixedModalModel, kind: str) -> None:
    text = model.text_tokenizer.encode
    broken = text("日")[:2]  # a character that never comes whole
    answer = [*text("Count é"), *broken, *text("日, "), *image(model, 3), *text("xy é seven"), *text("日 and on")]
    replica, _ = scripted(model, answer)
    request = request_of(**KINDS[kind])
    batches = 0

    async def counted(asked: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        nonlocal batches
        async with aclosing(replica.generate_batches(asked)) as found:
            async for batch in found:
                batches += 1
                yield batch

    whole = output_of(run(request, counted))
    assert isinstance(whole.last, Finished)
    assert batches > 12
    for first in range(batches):
        for then in (1, 2, None):
            ask = dying(replica, iter([first, then, None]))
            assert output_of(run(request, ask)) == whole, f"killed after {first} batches, then after {then}"


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_is_answered_and_however_they_die(model: MixedModalModel, data: st.DataObject) -> None:
    texts = st.lists(st.sampled_from(model.vocabulary.text_ids), min_size=1, max_size=8)
    parts = st.one_of(texts, st.builds(lambda code: image(model, code), st.integers(0, 15)))
    answer = list(itertools.chain(*data.draw(st.lists(parts, max_size=4))))
    numbers = st.lists(st.integers(1, 9), min_size=1, max_size=4)
    steps, together = data.draw(numbers), data.draw(numbers)
    stop = (model.text_tokenizer.decode(answer[1:3]),) if data.draw(st.booleans()) and answer[2:] else ()
    request = request_of(
        stop=tuple(one for one in stop if one),
        logprobs=data.draw(st.sampled_from([None, 0])),
        previews=data.draw(st.integers(0, 3)),
        progress=data.draw(st.booleans()),
    )
    replica, _ = scripted(model, answer)
    whole = output_of(run(request, replica.generate_batches))
    lives = data.draw(st.lists(st.one_of(st.none(), st.integers(3, 12)), max_size=6))  # long enough for some gain
    replica, _ = scripted(model, answer, steps, together)
    found = output_of(run(request, dying(replica, iter(lives))))
    if not (isinstance(found.last, RequestFailed) and found.last.status == 503):  # three in a row gained nothing
        assert found == whole


def test_what_has_come_is_not_drawn_again(model: MixedModalModel) -> None:
    text = model.text_tokenizer.encode("Count from two to four")
    answer = [*text, *image(model, 1)]
    middle = 1 + 2 * len(text) + 8  # batches: the start, each text and its id, some codes
    replica, engine = scripted(model, answer)
    run(request_of(), dying(replica, iter([middle])))
    assert 8 <= engine.drawn - len(answer) <= 10, "the other half of the codes"


def test_a_request_that_nobody_gets_on_with_is_given_up(model: MixedModalModel) -> None:
    replica, _ = scripted(model, model.text_tokenizer.encode("seven"))
    *events, last = run(request_of(), dying(replica, itertools.repeat(0)))
    assert not events
    assert isinstance(last, RequestFailed)
    assert (last.status, last.code) == (503, "unavailable")
    assert f"{ATTEMPTS} replicas were lost" in last.message
    *events, last = run(request_of(), dying(replica, iter([3, *[1] * ATTEMPTS])))
    assert isinstance(events[-1], TextDelta)
    assert isinstance(last, RequestFailed)
    lives = iter([3, 1] * 3)
    assert isinstance(run(request_of(), dying(replica, lives))[-1], Finished), "those that get on may lose any number"


# ---- what is sent on, and what is not


class Calls:
    """Replicas that send what they are told, in turn; an exception is raised."""

    def __init__(self, *calls: list[EventBatch | Exception]) -> None:
        self.calls = list(calls)
        self.requests: list[GenerationRequest] = []

    async def __call__(self, request: GenerationRequest) -> AsyncGenerator[EventBatch, None]:
        self.requests.append(request)
        for batch in self.calls.pop(0):
            if isinstance(batch, Exception):
                raise batch
            yield batch


def batch(*events: OutputEvent, tokens: tuple[int, ...] = ()) -> EventBatch:
    return EventBatch(list(events), tokens, sum(isinstance(event, TextDelta) for event in events))


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_left_open_is_the_same_for_all(seed: int | None) -> None:
    request = replace(request_of(), params=SamplingParams(5) if seed is None else SamplingParams(5, seed=seed))
    calls = Calls([batch(STARTED), ReplicaLost("")], [ReplicaLost("")], [batch(STARTED, FINISHED)])
    run(request, calls)
    seeds = {asked.params.seed for asked in calls.requests}
    assert len(calls.requests) == 3
    assert len(seeds) == 1
    assert seeds.isdisjoint({None, -1})
    assert len({asked.id for asked in calls.requests}) == 3, "a replica may still be at work on the last one"


@pytest.mark.parametrize(
    "failure",
    [
        RequestFailed(500, "the engine stopped", code="engine_failed"),
        RequestFailed(500, "the model's logits are no numbers", code="request_failed"),
        RequestFailed(503, "memory did not suffice", code="out_of_memory"),
        RequestFailed(400, "too long"),
    ],
)
@pytest.mark.parametrize("before", [[], [batch(STARTED)], [batch(STARTED, TextDelta("se"))]])
def test_what_has_failed_is_never_tried_elsewhere(before: list[EventBatch], failure: RequestFailed) -> None:
    calls = Calls([*before, batch(failure)])
    assert run(request_of(), calls)[-1] == failure
    assert len(calls.requests) == 1


def test_a_replica_that_says_the_request_has_no_part_in_its_end_is_lost_alone() -> None:
    lost = RequestFailed(503, "this replica is shutting down", code="unavailable")
    calls = Calls([batch(STARTED, TextDelta("se"), tokens=(9,)), batch(lost)], [batch(STARTED, FINISHED)])
    assert run(request_of(echo=True), calls) == [STARTED, TextDelta("se"), FINISHED]
    assert [asked.continuation for asked in calls.requests] == [None, Continuation((9,), 1)]
    assert [asked.echo for asked in calls.requests] == [True, False]


def test_an_output_without_an_end_is_none() -> None:
    assert run(request_of(), Calls([batch(STARTED)], [batch(STARTED, FINISHED)])) == [STARTED, FINISHED]


def test_full_replicas_turn_new_requests_away_and_no_begun_ones() -> None:
    [refused] = run(request_of(), Calls([ReplicasBusy()]))
    assert isinstance(refused, RequestFailed)
    assert (refused.status, refused.code) == (429, "overloaded")
    queued = RequestFailed(429, "in line already", code="overloaded")
    calls = [[batch(STARTED), ReplicaLost("")], *[[ReplicasBusy()], [batch(queued)]] * 5, [batch(STARTED, FINISHED)]]
    assert run(request_of(), Calls(*calls)) == [STARTED, FINISHED]


# ---- real engines


def free(**fields: Any) -> SamplingParams:
    sampling = PhaseSampling(1.3, 0.95, repetition_penalty=1.2), PhaseSampling(1.3, 0.95)
    return SamplingParams(60, text=sampling[0], image=sampling[1], **fields)


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        (free(mode="text", seed=3), {}),
        (free(mode="text", seed=4), {"logprobs": 2}),
        (free(mode="image", seed=5), {"progress": True, "previews": 2}),
        (free(mode="interleaved", seed=6), {"begin_with_image": True, "stop": ("e",)}),
        (free(mode="interleaved", seed=2**63 - 1, guidance_text=1.0, guidance_image=1.0), {"begin_with_image": True}),
    ],
)
def test_an_answer_goes_on_byte_for_byte(
    replica: EngineReplica, model: MixedModalModel, params: SamplingParams, fields: dict[str, Any]
) -> None:
    request = GenerationRequest("real", PROMPT, params, max_tokens=60, **fields)
    whole = output_of(run(request, replica.generate_batches))
    assert isinstance(whole.last, Finished)
    for life in range(1, 9):
        found = output_of(run(request, dying(replica, itertools.chain([life], itertools.repeat(3)))))
        assert replace(found, tokens=[]) == replace(whole, tokens=[])
        assert [replace(token, logprob=0, top=()) for token in found.tokens] == [
            replace(token, logprob=0, top=()) for token in whole.tokens
        ]
        for one, other in zip(found.tokens, whole.tokens, strict=True):  # the last bits depend on a pass's shape
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [value for *_, value in one.top] == pytest.approx([value for *_, value in other.top], abs=1e-4)


def test_it_avoids_the_replicas_that_failed_it() -> None:
    first = replace(batch(STARTED, TextDelta("a"), tokens=(5,)), replica="one")
    told = replace(batch(RequestFailed(503, "stopped", code="unavailable")), replica="two")
    calls = Calls([first, ReplicaLost("killed")], [told], [ReplicaLost("killed")], [batch(FINISHED)])
    assert isinstance(run(request_of(), calls)[-1], Finished)
    assert [asked.avoid for asked in calls.requests] == [(), ("one",), ("one", "two"), ("one", "two")]
