"""Memory that does not suffice, and errors of all kinds, put in from outside: they cost the newest requests, or those
they are about, and everybody else gets what they get alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams, StepFailed
from calumma.model.generation.attention.paged import PagedAttention
from calumma.model.generation.faults import MOST_IN_A_ROW, out_of_memory
from calumma.model.generation.passes import prompt_scores, runner
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.graphs import FixedShapePass
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.jacobi import JacobiDraft
from calumma.model.generation.sampling.sampler import Sampler
from calumma.model.generation.scheduler import Scheduler
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 13, 8, V.end_image]
SYSTEM = [V.bos, 15, 20, 17, 22, 22, 16]
PROMPTS = [
    [V.bos],
    [*SYSTEM, 19],
    [*SYSTEM, *IMAGE, 18],
    [*SYSTEM, *range(15, 25), *range(15, 25)],
]


class Fond(Output):
    """Logits of a model that stops seldom and likes to begin images."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., [V.eos, V.end_turn]] -= 2
        logits[..., V.begin_image] += 1
        return logits[..., columns or slice(None)]


@cache
def tiny() -> Transformer:
    config = ModelConfig(vocabulary_size=30, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Fond(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
    return transformer.eval()


Asked = tuple[int, Any, int, float, float, int]


def whose(id: str) -> dict[str, Any]:
    """Three tenants, each with requests of two priorities."""
    return {"tenant": "abc"[ord(id[-1]) % 3], "priority": ord(id[-1]) % 2}


def asked(id: str, number: int, mode: Any, max_tokens: int, heat: float, guidance: float, seed: int) -> Request:
    text = PhaseSampling(heat, 0.9 if seed % 2 else 1.0, 1.2, seed % 3 * 5, presence_penalty=seed % 2)
    image = PhaseSampling(heat, 0.95, min_p=0.01 * (seed % 2))
    scored = 1 if seed % 5 == 4 else None
    return Request(
        id,
        PROMPTS[number],
        SamplingParams(
            max_tokens, mode, 3, text, image, guidance, 1.2 if guidance > 1 else 1.0, seed, prompt_logprobs=scored
        ),
        **whose(id),
    )


def told(events: list[Event]) -> tuple[list[int], str | None, str | None]:
    """Tokens, how they ended, and why they failed."""
    failure = events[-1].failure
    tokens = [token for event in events for token in event.tokens]
    return tokens, events[-1].finish, failure.kind if failure else None


def run(engine: Engine) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


@cache
def alone(request: Asked, window: int = 0) -> tuple[list[int], str | None, str | None]:
    engine = Engine(tiny(), V, N, jacobi_window=window)
    engine.add(asked("r", *request))
    return told(run(engine)["r"])


requests = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from(["text", "image", "interleaved"]),
    st.sampled_from([1, 7, 25]),
    st.sampled_from([0.0, 1.3]),
    st.sampled_from([1.0, 3.0]),
    st.integers(0, 6),
)
engines = st.fixed_dictionaries(
    {
        "max_sequences": st.sampled_from([1, 3, 8]),
        "prefill_tokens": st.sampled_from([1, 5, 100]),
        "image_burst": st.sampled_from([1, 3]),
        "block_size": st.sampled_from([1, 4, 8]),
        "cache_tokens": st.sampled_from([184, 256, 1024]),
        "prefix_cache": st.booleans(),
        "cuda_graphs": st.booleans(),  # passes of fixed shapes, which are filled up
        "jacobi_window": st.sampled_from([0, 0, 2]),
    }
)


def clean(engine: Engine) -> None:
    """Nobody holds anything, and nothing that is kept or will be read behind a mask is no number."""
    assert engine.statistics.blocks_used == 0
    assert bool(engine._runner.cache.store.isfinite().all())


SHORT: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: MemoryError(),
]
PLACES: dict[str, tuple[Any, str]] = {
    "a layer": (PagedAttention, "attend"),
    "logits": (Decoder, "logits"),
    "drawing": (Sampler, "sample"),
    "verifying": (JacobiDraft, "verify"),
    "scoring": (prompt_scores, "id_logprob_pairs"),
    "reading": (runner, "read_samples"),
    "counting": (runner.ModelRunner, "_count_cached"),
}


def test_real_allocators_messages_are_known() -> None:
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(1 << 60)
    assert out_of_memory(torchs.value)
    assert all(out_of_memory(error()) for error in SHORT)
    assert not out_of_memory(RuntimeError("the size of tensor a must match"))
    assert not out_of_memory(ValueError("out of memory"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    options=engines,
    mix=st.lists(st.tuples(requests, st.integers(0, 3)), min_size=1, max_size=8),
    place=st.sampled_from(sorted(PLACES)),
    first=st.integers(0, 60),
    often=st.integers(1, 6),
    error=st.sampled_from(SHORT),
)
def test_out_of_memory_sheds_the_newest(
    options: dict[str, Any], mix: list[tuple[Asked, int]], place: str, first: int, often: int, error: Any
) -> None:
    """Whatever allocation fails, and however often in a row: who is not shed gets all it gets alone."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), iter(range(100_000))

    def failing(*given: Any, **named: Any) -> Any:
        if first <= next(calls) < first + often:
            raise error()
        return original(*given, **named)

    window = options["jacobi_window"]
    expected = [alone(request, window) for request, _ in mix]
    found: dict[str, list[Event]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        engine = Engine(tiny(), V, N, **options)
        for number, (request, steps) in enumerate(mix):
            engine.add(asked(str(number), *request))
            for _ in range(steps):
                for event in engine.step():
                    found.setdefault(event.request_id, []).append(event)
        for id, events in run(engine).items():
            found.setdefault(id, []).extend(events)
    assert len(found) == len(mix)
    for number in range(len(mix)):
        tokens, finish, kind = told(found[str(number)])
        if kind is None:
            assert (tokens, finish, kind) == expected[number]
        else:
            assert (finish, kind) == ("failed", "out of memory")
            assert tokens == expected[number][0][: len(tokens)]
    clean(engine)


def test_who_is_shed_is_the_newest_and_only_while_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of more than three requests does not fit."""
    hidden, tried = Decoder.hidden, []

    def limited(self: Decoder, tokens_T: Tensor, paged: Any, *adapters: Any) -> Tensor:
        tried.append(len(tokens_T))
        if len(tokens_T) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(self, tokens_T, paged, *adapters)

    monkeypatch.setattr(Decoder, "hidden", limited)
    engine = Engine(tiny(), V, N)
    params = SamplingParams(4, text=PhaseSampling(0.0), ignore_eos=True)
    for number in range(5):
        engine.add(Request(str(number), [V.bos], params))
    events = engine.step()
    assert tried == [5, 5, 4, 3]  # once more without what is kept to be fast, then without the newest
    assert [e.request_id for e in events if e.finish == "failed"] == ["4", "3"]
    assert all(e.failure is not None and "newest" in e.failure.message for e in events if e.finish)
    assert {id: told(each)[1] for id, each in run(engine).items()} == dict.fromkeys("012", "length")
    assert engine.statistics.counters.failed == 2
    engine.add(Request("later", [V.bos], params))
    assert told(run(engine)["later"])[1] == "length"


def test_of_several_tenants_the_one_with_most_is_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = Decoder.hidden

    def limited(self: Decoder, tokens_T: Tensor, paged: Any, *adapters: Any) -> Tensor:
        if len(tokens_T) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden(self, tokens_T, paged, *adapters)

    monkeypatch.setattr(Decoder, "hidden", limited)
    engine = Engine(tiny(), V, N)
    for number, tenant in enumerate("aaab"):
        engine.add(Request(str(number), [V.bos], SamplingParams(4, ignore_eos=True), tenant))
    assert {id: told(events)[1] for id, events in run(engine).items()} == {
        "0": "length", "1": "length", "2": "failed", "3": "length"
    }  # fmt: skip


def test_a_recording_that_does_not_fit_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def record(self: FixedShapePass, pool: Any) -> Any:
        recorded.append((self.B, self.M))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    engine = Engine(tiny(), V, N, cuda_graphs=True)
    expected = alone((0, "text", 7, 0.0, 1.0, 0))
    engine.add(asked("r", 0, "text", 7, 0.0, 1.0, 0))
    hidden = engine._runner.graphs.hidden  # type: ignore[union-attr]

    def on_a_device(tokens_T: Tensor, *given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "is_cuda", True)
            return hidden(tokens_T, *given)

    monkeypatch.setattr(FixedShapePass, "record", record)
    monkeypatch.setattr(engine._runner.graphs, "hidden", on_a_device)
    assert told(run(engine)["r"]) == expected
    assert len(recorded) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=engines, mix=st.lists(requests, min_size=2, max_size=6), data=st.data())
def test_a_request_whose_passes_raise_fails_alone(options: dict[str, Any], mix: list[Asked], data: Any) -> None:
    """Found out by halves; the others go on within the same step."""
    window = options["jacobi_window"]
    expected = [alone(request, window) for request in mix]
    guilty = data.draw(st.integers(1, len(mix) - 1))
    lay_out = runner.lay_out

    def refusing(scheduled: Any, *given: Any) -> Any:
        if any(item.state.request.id == str(guilty) and item.samples for item in scheduled):
            raise ValueError("what a strange request")
        return lay_out(scheduled, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "lay_out", refusing)
        engine = Engine(tiny(), V, N, **options)
        for number, request in enumerate(mix):
            engine.add(asked(str(number), *request))
        found = run(engine)
    for number in range(len(mix)):
        if number == guilty:
            (tokens, finish, kind), failure = told(found[str(number)]), found[str(number)][-1].failure
            assert (tokens, finish, kind) == ([], "failed", "error") or mix[number][1] == "image"
            assert failure is not None
            assert "ValueError: what a strange request" in failure.message
        else:
            assert told(found[str(number)]) == expected[number]
    clean(engine)


BOOKS: dict[str, tuple[Any, str, Callable[..., str]]] = {
    "accepting": (RequestState, "accept", lambda state, *_: state.request.id),
    "planning": (Scheduler, "_plan", lambda _, state, *__: state.request.id),
    "taking a seat": (Engine, "_seat", lambda _, state: state.request.id),
    "attaching": (Scheduler, "_attach", lambda _, state, *__: state.request.id),
    "beginning": (RequestState, "__init__", lambda _, request, *__: request.id),
}


@pytest.mark.parametrize("place", BOOKS)
@pytest.mark.parametrize("call", [0, 2])
def test_an_error_in_a_requests_books_ends_it_alone(monkeypatch: pytest.MonkeyPatch, place: str, call: int) -> None:
    owner, name, whose = BOOKS[place]
    mix: list[Asked] = [(number % 4, "interleaved", 12, 1.3, 3.0, number) for number in range(5)]
    expected = [alone(request) for request in mix]
    original, calls = getattr(owner, name), iter(range(1000))

    def failing(*given: Any) -> Any:
        if whose(*given) == "3" and next(calls) == call:
            raise ArithmeticError("books that do not balance")
        return original(*given)

    monkeypatch.setattr(owner, name, failing)
    engine = Engine(tiny(), V, N, block_size=4)
    for number, request in enumerate(mix):
        engine.add(asked(str(number), *request))
    found = run(engine)
    for number in (0, 1, 2, 4):
        assert told(found[str(number)]) == expected[number]
    if next(calls) > call:
        failure = found["3"][-1].failure
        assert failure is not None
        assert failure.kind == "error"
        assert "ArithmeticError: books that do not balance" in failure.message
    clean(engine)
    assert engine.step() == []


def test_an_engine_that_is_broken_says_who_was_in_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    engine = Engine(tiny(), V, N, max_sequences=2)
    for number in range(3):
        engine.add(Request(str(number), [V.bos], SamplingParams(5)))
    monkeypatch.setattr(Decoder, "hidden", broken)
    with pytest.raises(StepFailed, match="no kernel image") as failed:
        engine.step()
    assert failed.value.request_ids == ("0", "1")  # the third was not in it


def test_several_lone_requests_in_a_row_are_put_down_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, hidden = Engine(tiny(), V, N), Decoder.hidden
    broken = False

    def sometimes(self: Decoder, *given: Any) -> Any:
        if broken:
            raise RuntimeError("no kernel image is available")
        return hidden(self, *given)

    monkeypatch.setattr(Decoder, "hidden", sometimes)

    def ask(id: str) -> str | None:
        engine.add(Request(id, [V.bos], SamplingParams(2)))
        return told(run(engine)[id])[1]

    broken = True
    assert [ask(str(number)) for number in range(MOST_IN_A_ROW - 1)] == ["failed"] * (MOST_IN_A_ROW - 1)
    broken = False
    assert ask("sound") != "failed"
    broken = True
    assert [ask(f"again {number}") for number in range(MOST_IN_A_ROW - 1)] == ["failed"] * (MOST_IN_A_ROW - 1)
    with pytest.raises(StepFailed):
        ask("one too many")


def test_a_device_that_is_lost_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def lost(*given: Any) -> Any:
        tried.append(given)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = Engine(tiny(), V, N)
    for number in range(4):
        engine.add(Request(str(number), [V.bos], SamplingParams(5)))
    monkeypatch.setattr(Decoder, "hidden", lost)
    with pytest.raises(StepFailed, match="illegal memory access"):
        engine.step()
    assert len(tried) == 1


def test_drafts_of_a_pass_that_raised_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of requests that had been verified before it raised."""
    mix: list[Asked] = [(number, "image", 1, 1.3, 3.0, number) for number in range(3)]
    expected = [alone(request, 2) for request in mix]
    original, calls = JacobiDraft.verify, iter(range(1000))

    def failing(*given: Any) -> Any:
        if next(calls) in (5, 6):
            raise MemoryError
        return original(*given)

    monkeypatch.setattr(JacobiDraft, "verify", failing)
    engine = Engine(tiny(), V, N, jacobi_window=2)
    for number, request in enumerate(mix):
        engine.add(replace(asked(str(number), *request), tenant="", priority=0))
    found = run(engine)
    assert [told(found[id]) for id in "01"] == expected[:2]
