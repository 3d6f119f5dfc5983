"""Any mix of requests under any pressure gives each the tokens it gets alone; and the books of the cache's blocks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 14, 8, V.end_image]
SYSTEM = [V.bos, 15, 20, 17, 22, 22, 16]
PROMPTS = [
    [V.bos],
    SYSTEM,
    [*SYSTEM, 19],
    [*SYSTEM, *IMAGE, 18],
    [V.bos, *IMAGE, 19, 16, V.begin_image, 10, 10, 11, 13, V.end_image, V.end_turn],
    [*SYSTEM, *range(15, 27), *range(15, 27)],
]


class Fond(Output):
    """Logits of a model that stops seldom and likes to begin images."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., [V.eos, V.end_turn]] -= 2
        logits[..., V.begin_image] += 2
        return logits[..., columns or slice(None)]


@cache
def tiny() -> Transformer:
    """Weights large enough that a token's distribution depends on what precedes it."""
    config = ModelConfig(vocabulary_size=30, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Fond(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
    return transformer.eval()


@cache
def alone(number: int, mode: Any, max_tokens: int, heat: float, guidance: float) -> tuple[int, ...]:
    engine = Engine(tiny(), V, N)
    engine.add(asked("r", number, mode, max_tokens, heat, guidance))
    return tuple(token for _ in iter(lambda: engine.has_work, False) for e in engine.step() for token in e.tokens)


def whose(id: str) -> dict[str, Any]:
    """Three tenants, each with requests of two priorities."""
    return {"tenant": "abc"[ord(id[-1]) % 3], "priority": ord(id[-1]) % 2}


def asked(id: str, number: int, mode: Any, max_tokens: int, heat: float, guidance: float) -> Request:
    text = PhaseSampling(heat, 0.9 if number % 2 else 1.0, 1.2, top_k=number % 3 * 5)
    image = PhaseSampling(heat, 0.95, min_p=0.01 * (number % 2))
    return Request(
        id,
        PROMPTS[number],
        SamplingParams(
            max_tokens,
            mode,
            3,
            text,
            image,
            guidance,
            1.2 if guidance > 1 else 1.0,
            seed=number,
            guidance_begin=0.25 * (number // 2),
            guidance_end=1 - 0.25 * (number % 2),
            guidance_schedule="linear" if number == 3 else "constant",
        ),
        **whose(id),
    )


requests = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from(["text", "image", "interleaved"]),
    st.sampled_from([1, 7, 25]),
    st.sampled_from([0.0, 1.3]),
    st.sampled_from([1.0, 3.0]),
)
engines = st.fixed_dictionaries(
    {
        "max_sequences": st.sampled_from([1, 3, 8]),
        "prefill_tokens": st.sampled_from([1, 5, 100]),
        "image_burst": st.sampled_from([1, 3]),
        "block_size": st.sampled_from([1, 4, 8]),
        "cache_tokens": st.sampled_from([184, 256, 1024]),
        "prefix_cache": st.booleans(),
        "ahead": st.booleans(),
        "host_cache": st.sampled_from([0, 20_000, 1_000_000]),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(options=engines, mix=st.lists(st.tuples(requests, st.integers(0, 3)), min_size=1, max_size=8))
def test_a_request_gets_the_tokens_it_gets_alone(options: dict[str, Any], mix: list[tuple[Any, int]]) -> None:
    """Greedy and seeded, whoever comes with it or some steps later, however little the cache holds."""
    engine = Engine(tiny(), V, N, **options)
    found: dict[str, list[int]] = {}
    for number, (request, steps) in enumerate(mix):
        engine.add(asked(str(number), *request))
        for _ in range(steps):
            for event in engine.step():
                found.setdefault(event.request_id, []).extend(event.tokens)
    while engine.has_work:
        for event in engine.step():
            found.setdefault(event.request_id, []).extend(event.tokens)
    assert {id: tuple(tokens) for id, tokens in found.items()} == {
        str(number): alone(*request) for number, (request, _) in enumerate(mix)
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_mixes_do_preempt_and_share(seed: int) -> None:
    """What the test above would be worth little without."""
    engine = Engine(tiny(), V, N, block_size=4, cache_tokens=184)
    generator = torch.Generator().manual_seed(seed)
    for number in range(30):
        prompt = int(torch.randint(2, len(PROMPTS), (), generator=generator))
        request = asked(str(number), prompt, "interleaved", 25, 1.3, 3.0)
        engine.add(replace(request, params=replace(request.params, seed=number)))
    while engine.has_work:
        engine.step()
    statistics = engine.statistics
    assert statistics.counters.preemptions > 0
    assert statistics.prefix_hit_tokens > 0
    assert statistics.evictions > 0


class Life(RuleBasedStateMachine):
    """An engine with a cache that is too small for everybody, under any order of adding, stepping and aborting."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {}
        self.found: dict[str, list[Event]] = {}
        self.steps_since: dict[str, int] = {}
        self.finished: set[str] = set()

    @initialize(options=engines)
    def start(self, options: dict[str, Any]) -> None:
        self.engine = Engine(tiny(), V, N, **{**options, "cache_tokens": 184})

    @rule(request=requests)
    def add(self, request: Any) -> None:
        id = str(len(self.asked))
        self.engine.add(asked(id, *request))
        self.asked[id], self.found[id] = request, []

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.engine.has_work:
                self.take(self.engine.step())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.asked))))

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.request_id not in self.finished
            self.found[event.request_id].append(event)
            if event.finish:
                self.finished.add(event.request_id)

    @invariant()
    def every_block_is_free_kept_or_referenced_as_often_as_counted(self) -> None:
        engine = self.engine
        blocks, scheduler = engine._blocks, engine._scheduler
        held: Counter[int] = Counter()
        for generation in scheduler.running:
            for sequence in (*generation.sequences, *generation.retired):
                held.update(sequence.blocks)
                assert sequence.cached <= len(sequence.blocks) * blocks.size
                assert len(sequence.chain) == sequence.cached // blocks.size
        assert not any(sequence.blocks for generation in scheduler.waiting for sequence in generation.sequences)
        assert [held[block] for block in range(blocks.count)] == blocks.references
        free, idle = set(blocks._free), set(blocks._idle)
        assert len(free) == blocks.free
        assert not free & idle
        assert free | idle == {block for block in range(blocks.count) if not held[block]}
        assert idle <= set(blocks._content)
        assert not free & set(blocks._content)
        listed = {block: (chain, tokens) for chain, c in blocks._children.items() for tokens, block in c}
        assert listed == blocks._content
        assert all(children == sorted(children) for children in blocks._children.values())

    @invariant()
    def seats_and_order_are_kept(self) -> None:
        scheduler = self.engine._scheduler
        seats = [generation.seat for generation in scheduler.running] + scheduler._seats
        assert sorted(seats) == list(range(self.engine.max_sequences))
        for line in (scheduler.running, scheduler.waiting):
            arrivals = [generation.arrival for generation in line]
            assert arrivals == sorted(arrivals)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Nobody starves: the oldest always moves, so all end within as many steps as alone, one after the other,
        # each of at most 64 tokens of each of three sequences, recomputed no oftener than an older one moves.
        limit = 3 * CONTEXT * (len(self.asked) + 1)
        for _ in range(limit):
            if not self.engine.has_work:
                break
            self.take(self.engine.step())
        assert not self.engine.has_work
        self.every_block_is_free_kept_or_referenced_as_often_as_counted()
        assert self.finished == set(self.asked)
        statistics = self.engine.statistics
        assert (statistics.blocks_used, statistics.waiting, self.engine.running) == (0, 0, 0)
        for id, request in self.asked.items():
            tokens = tuple(token for event in self.found[id] for token in event.tokens)
            aborted = self.found[id][-1].finish == "aborted"
            expected = alone(*request)
            assert tokens == (expected[: len(tokens)] if aborted else expected)


Life.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestLife = Life.TestCase
