"""Logits that are no numbers, put in from outside: they cost the requests they are about, and everybody else gets what
they get alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.generation.cache import contiguous
from calumma.model.generation.cache.block_manager import BlockManager
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.sampling import filters
from calumma.model.generation.sampling.sampler import Sampler
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
POISON, POISON_CODE = 27 - 1, 14  # ids that no pass can compute
IMAGE = [V.begin_image, 7, 9, 13, 8, V.end_image]
SYSTEM = [V.bos, 15, 20, 17, 22, 22, 16]
PROMPTS = [
    [V.bos],
    [*SYSTEM, 19],
    [*SYSTEM, *IMAGE, 18],
    [*SYSTEM, *range(15, 25), *range(15, 25)],
    [*SYSTEM, POISON, 15],
    [*SYSTEM, *range(15, 25), POISON, *range(15, 25)],
    [V.bos, V.begin_image, 7, 9, POISON_CODE, 8, V.end_image, 16],
]


class Fond(Output):
    """Logits of a model that stops seldom, likes to begin images, and to say what is poison."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., [V.eos, V.end_turn]] -= 2
        logits[..., [V.begin_image, POISON]] += 1
        return logits[..., columns or slice(None)]


@cache
def tiny(poisoned: bool = False) -> Transformer:
    config = ModelConfig(vocabulary_size=30, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Fond(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
        if poisoned:
            transformer.embedding.weight[[POISON, POISON_CODE]] = float("nan")
    return transformer.eval()


Asked = tuple[int, Any, int, float, float, int]


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
def alone(request: Asked, poisoned: bool, window: int = 0) -> tuple[list[int], str | None, str | None]:
    engine = Engine(tiny(poisoned), V, N, jacobi_window=window)
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
sound = requests.filter(lambda request: request[0] < 4)
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
        "ahead": st.booleans(),
        "host_cache": st.sampled_from([0, 20_000, 1_000_000]),
    }
)


def clean(engine: Engine) -> None:
    """Nobody holds anything, and nothing that is kept or will be read behind a mask is no number."""
    assert engine.statistics.blocks_used == 0
    assert bool(engine._runner.cache.store.isfinite().all())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=engines, mix=st.lists(st.tuples(requests, st.integers(0, 3)), min_size=2, max_size=8))
def test_what_cannot_be_computed_fails_alone(options: dict[str, Any], mix: list[tuple[Asked, int]]) -> None:
    """Poison in prompts, drawn within texts and images, in branches, in chunks and bursts; in any company, each gets
    what it gets alone, and those without poison what a sound model gives them."""
    engine = Engine(tiny(True), V, N, **options)
    found: dict[str, list[Event]] = {}
    for number, (request, steps) in enumerate(mix):
        engine.add(asked(str(number), *request))
        for _ in range(steps):
            for event in engine.step():
                found.setdefault(event.request_id, []).append(event)
    for id, events in run(engine).items():
        found.setdefault(id, []).extend(events)
    window = options["jacobi_window"]
    for number, (request, _) in enumerate(mix):
        answer = told(found[str(number)])
        assert answer == alone(request, True, window)
        assert answer[2] in (None, "not finite")
        assert (answer[1] == "failed") == (answer[2] is not None)
        if answer[2] is None:
            assert answer == alone(request, False, window)
    assert engine.statistics.counters.failed == sum(events[-1].finish == "failed" for events in found.values())
    clean(engine)


def test_the_mixes_do_fail_and_survive() -> None:
    """What the test above would be worth little without: in all phases."""
    ends = set()
    for number in range(len(PROMPTS)):
        for seed in range(5):
            for mode in ("text", "image", "interleaved"):
                tokens, finish, _ = alone((number, mode, 25, 1.3, 3.0, seed), True)
                last = None if not tokens else "code" if tokens[-1] == POISON_CODE else tokens[-1] == POISON
                ends.add((finish == "failed", last))
    assert {(True, None), (True, "code"), (True, True), (False, False)} <= ends


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of passes, from 0, in which the state of id 24 is no number: a fault that passes."""
    passes: set[int] = set()
    count = iter(range(10_000))
    embed = Decoder._embed

    def spoiling(self: Decoder, tokens_T: Tensor) -> Tensor:
        x_TD = embed(self, tokens_T)
        if next(count) in passes:
            x_TD = x_TD.masked_fill((tokens_T == 24)[:, None], float("nan"))
        return x_TD

    monkeypatch.setattr(Decoder, "_embed", spoiling)
    return passes


@pytest.mark.parametrize("prefill", [4, 100])
def test_what_a_pass_spoiled_is_found_by_nobody(spoiled: set[int], prefill: int) -> None:
    """Another request of the same prompt, at the same time or later, computes it anew."""
    prompt = [V.bos, 15, 24, 17, 22, 16, 18, 19, 20, 21, 23, 15]
    params = SamplingParams(6, text=PhaseSampling(0.0))

    def engine_with(*ids: str) -> Engine:
        engine = Engine(tiny(), V, N, block_size=2, prefill_tokens=prefill)
        for id in ids:
            engine.add(Request(id, prompt, params))
        return engine

    expected = told(run(engine_with("r"))["r"])
    assert expected[1] in ("stop", "length")
    start = max(spoiled, default=-1)
    assert start == -1
    engine = engine_with("first")
    spoiled.update(range(100))  # the passes of the next engine begin somewhere there
    assert told(engine.step() or run(engine)["first"]) == ([], "failed", "not finite")
    spoiled.clear()
    assert engine.statistics.blocks_cached == 0
    clean(engine)
    hits = engine.statistics.prefix_hit_tokens
    engine.add(Request("second", prompt, params))
    assert told(run(engine)["second"]) == expected
    assert engine.statistics.prefix_hit_tokens == hits
    engine.add(Request("third", prompt, params))
    assert told(run(engine)["third"]) == expected
    assert engine.statistics.prefix_hit_tokens > hits  # once it is known to be sound


def test_a_prompt_that_is_no_number_fails_before_its_end(spoiled: set[int]) -> None:
    engine = Engine(tiny(True), V, N, prefill_tokens=4)
    engine.add(Request("r", PROMPTS[5], SamplingParams(5)))
    steps = 0
    while engine.has_work:
        events = engine.step()
        steps += 1
    assert events[-1].finish == "failed"
    assert steps == 5  # the 18th token is in the fifth part of four


def test_blocks_that_are_not_verified_are_cleared_and_forgotten() -> None:
    cleared: list[int] = []
    blocks = BlockManager(8, 2, lambda source, target: None, cleared.extend)
    written = Sequence(list(range(7)))
    blocks.grow(written, 7)
    held = list(written.blocks)
    written.cached, written.verified = 6, 3
    blocks.cache_full_blocks(written)
    blocks.release(written)
    assert sorted(cleared) == sorted(held[1:])
    assert (blocks.idle, blocks.free) == (1, 7)
    assert blocks.lookup(Sequence(list(range(7))))[:2] == (0, 1)


@pytest.mark.parametrize("copied", [True, False])
def test_who_is_filled_up_in_a_pass_reads_nobody_elses_blocks(monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    """Attention reads what it masks: a block of a request that is no number must not stand in for one of another's."""
    if not copied:
        monkeypatch.setattr(contiguous, "CONTIGUOUS_BYTES", 0)
    greedy = {"text": PhaseSampling(0.0), "max_tokens": 9}
    bad = Request("bad", [V.bos], SamplingParams(**greedy, allowed_ids=(POISON,)))
    others = [
        Request(f"{len(prompt)}", prompt, SamplingParams(**greedy, ignore_eos=True, bad_words=((POISON,),)))
        for prompt in ([V.bos, 20], [V.bos, *range(15, 26)])
    ]
    engine, single = Engine(tiny(True), V, N, block_size=4), Engine(tiny(), V, N)
    engine.add(bad)
    for request in others:
        engine.add(request)
        single.add(request)
    found: dict[str, list[Event]] = {event.request_id: [event] for event in engine.step()}
    assert engine._scheduler.running[0].full.blocks == [0]
    for id, events in run(engine).items():
        found[id] += events
    assert told(found.pop("bad")) == ([POISON], "failed", "not finite")
    assert {id: told(events) for id, events in found.items()} == {id: told(each) for id, each in run(single).items()}


def test_what_fills_up_a_fixed_shape_is_cleared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole pass that is no number, what it is filled up with included."""
    embed, spoil = Decoder._embed, False

    def spoiling(self: Decoder, tokens_T: Tensor) -> Tensor:
        x_TD = embed(self, tokens_T)
        return torch.full_like(x_TD, float("nan")) if spoil else x_TD

    monkeypatch.setattr(Decoder, "_embed", spoiling)
    engine = Engine(tiny(), V, N, block_size=4, cuda_graphs=True)
    params = SamplingParams(20, text=PhaseSampling(0.0), ignore_eos=True)
    for number in range(3):  # of a shape for four
        engine.add(Request(str(number), [V.bos, 15 + number], params))
    engine.step()
    engine.step()
    spoil = True
    assert [event.finish for event in engine.step()] == ["failed"] * 3
    spoil = False
    clean(engine)
    engine.add(Request("later", [V.bos, 15], params))
    assert told(run(engine)["later"])[1] == "length"


def test_a_draft_after_which_there_are_no_numbers_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code before it was drawn from numbers: the answer goes on."""
    probabilities, spoiled = Sampler.image_probabilities, []

    def spoiling(self: Sampler, logits_RC: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        p_RC, logprobs_RC = probabilities(self, logits_RC, *given)
        if len(p_RC) > 1:
            p_RC[1:] = float("nan")
            spoiled.append(len(p_RC))
        return p_RC, logprobs_RC

    monkeypatch.setattr(Sampler, "image_probabilities", spoiling)
    engine = Engine(tiny(), V, N, jacobi_window=3)
    engine.add(Request("r", PROMPTS[1], SamplingParams(mode="image", seed=3)))
    tokens, finish, _ = told(run(engine)["r"])
    assert (len(tokens), finish) == (N + 2, "stop")
    assert spoiled
    clean(engine)


def test_filters_that_look_places_up_by_value_are_given_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do with the flat rows of a large vocabulary."""
    monkeypatch.setattr(filters, "FEW", 1)
    monkeypatch.setattr(filters, "MANY", 2)
    engine = Engine(tiny(True), V, N)
    params = [SamplingParams(9, text=PhaseSampling(1.3, top_p), seed=1, ignore_eos=True) for top_p in (0.3, 0.9, 1.0)]
    for number, each in enumerate(params):
        engine.add(Request(f"bad {number}", PROMPTS[4], each))
        engine.add(Request(f"good {number}", PROMPTS[1], each))
    found = {id: told(events) for id, events in run(engine).items()}
    assert all(kind == "not finite" for id, (_, _, kind) in found.items() if id.startswith("bad"))
    for number, each in enumerate(params):
        single = Engine(tiny(True), V, N)
        single.add(Request("r", PROMPTS[1], each))
        assert told(run(single)["r"]) == found[f"good {number}"]
