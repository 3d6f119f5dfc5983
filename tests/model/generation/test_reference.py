"""The generation engine on a tiny random Transformer, compared with plain, un-cached forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.generation.sampling.categorical import TRIES
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
STOPS = {V.eos, V.end_turn}
IMAGE = [V.begin_image, 7, 9, 14, 8, V.end_image]
GREEDY = PhaseSampling(temperature=0, repetition_penalty=1.3)
GREEDY_IMAGE = PhaseSampling(temperature=0)


# What is added to the logits of models that never want to stop, and that always want to begin an image.
TALKER, EAGER = ({**dict.fromkeys(STOPS, -100.0), V.begin_image: bias} for bias in (1.0, 100.0))
KINDS: list[dict[int, float]] = [{}, TALKER, EAGER]
Tiny = Callable[..., Transformer]


@pytest.fixture(scope="session")
def tiny(make_transformer: Callable[..., Transformer]) -> Tiny:
    """(kind, seed)"""
    return lambda kind=KINDS[0], seed=0: make_transformer(30, seed, kind, context=CONTEXT, dropout=0.1)


def engine_of(transformer: Transformer, **options: Any) -> Engine:
    return Engine(transformer, V, N, **options)


def run(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    """Add all, step to the end; the events of each request."""
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def answer(transformer: Transformer, request: Request, **options: Any) -> list[int]:
    return tokens_of(run(engine_of(transformer, **options), request)[request.id])


def images_in(tokens: list[int]) -> list[list[int]]:
    """The images of a sequence, after a check that it is text and whole images only."""
    images, position = [], 0
    while position < len(tokens):
        if tokens[position] == V.begin_image:
            image = tokens[position : position + N + 2]
            assert len(image) == N + 2
            assert all(code in V.image_ids for code in image[1:-1])
            assert image[-1] == V.end_image
            images.append(image)
            position += N + 2
        else:
            assert tokens[position] in V.text_ids
            position += 1
    return images


def draw(logits_V: Tensor, sampling: PhaseSampling, numbers: list[float]) -> int:
    """Greedy, or the id at which the mass, in order of ids, passes a number of it: of all ids, at the first number that
    leads into the top-p set, or of that set, at the last number."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    chances = (logits_V / sampling.temperature).softmax(-1).tolist()
    kept: set[int] = set()
    for token in sorted(range(len(chances)), key=lambda token: -chances[token]):
        if not kept or sum(chances[t] for t in kept) < min(sampling.top_p, 1 - 1e-6):
            kept.add(token)
    everything = set(range(len(chances)))
    for possible, number in [*((everything, each) for each in numbers[:-1]), (kept, numbers[-1])]:
        left = number * sum(chances[token] for token in possible)
        for token in sorted(possible):
            left -= chances[token]
            if left < 0:
                break
        if token in kept:
            break
    return token


def strength(params: SamplingParams, code: int) -> float:
    """Of guidance at a code, within its interval, as arXiv 2404.13040 has it rise."""
    begin, end = round(params.guidance_begin * N), round(params.guidance_end * N)
    if code not in range(begin, end):
        return 0.0
    part = (code + 1 - begin) / (end - begin)
    return {"constant": 1.0, "linear": part, "cosine": 0.5 - 0.5 * math.cos(math.pi * part)}[params.guidance_schedule]


@torch.no_grad()
def reference(
    transformer: Transformer, prompt: list[int], params: SamplingParams
) -> tuple[list[int], list[float], str]:
    """One sequence by the letter of the paper: three whole forward passes for each code, no cache."""

    def logits(context: list[int]) -> Tensor:
        return transformer(torch.tensor([context]))[0, -1]

    # 24 bits of each 32 that a counter gives; NumPy counts before it gives
    words = np.random.Philox(key=params.seed or 0, counter=2**256 - 1).random_raw(4 * CONTEXT).astype("<u8").view("<u4")
    numbers = (words.reshape(CONTEXT, 8)[:, : TRIES + 1] // 256 / 2**24).tolist()
    generated: list[int] = []
    logprobs: list[float] = []
    limit = N + 2 if params.mode == "image" else min(params.max_tokens, CONTEXT - len(prompt))
    images_left = {"text": 0, "image": 1, "interleaved": params.max_images}[params.mode]
    codes: list[int] | None = None
    while True:
        context = prompt + generated
        f_V = logits(context)
        if codes is None:
            allowed = [*V.text_ids, *STOPS]
            if images_left and limit - len(generated) >= N + 2:
                allowed = [V.begin_image] if params.mode == "image" else [*allowed, V.begin_image]
        elif len(codes) == N:
            allowed = [V.end_image]
        else:
            allowed = V.image_ids
            before = images_in([t for t in context[: -len(codes) - 1] if t not in (V.bos, V.end_turn)])
            earlier = [token for image in before for token in image]
            i_V = logits([V.bos, *earlier, V.begin_image, *codes])
            u_V = logits([V.bos, V.begin_image, *codes])
            by_image, by_text = (
                1 + strength(params, len(codes)) * (s - 1) for s in (params.guidance_image, params.guidance_text)
            )
            f_V = u_V + by_image * (i_V - u_V) + by_text * (f_V - i_V)
        masked_V = torch.full_like(f_V, float("-inf"))
        masked_V[allowed] = f_V[allowed]
        chosen_V = masked_V.clone()
        if codes is None:
            for token in {t for t in context if t in V.text_ids}:
                penalty = params.text.repetition_penalty
                chosen_V[token] = chosen_V[token] / penalty if chosen_V[token] > 0 else chosen_V[token] * penalty
        forced = params.mode == "image" and not generated  # begin_image is not drawn
        token = (
            allowed[0]
            if forced
            else draw(chosen_V, params.text if codes is None else params.image, numbers[len(generated)])
        )
        if codes is None and token in STOPS:
            return generated, logprobs, "stop"
        generated.append(token)
        logprobs.append(float(masked_V.log_softmax(-1)[token]))
        if token == V.begin_image:
            codes, images_left = [], images_left - 1
        elif token == V.end_image:
            codes = None
            if params.mode == "image":
                return generated, logprobs, "stop"
        elif codes is not None:
            codes.append(token)
        if len(generated) == limit:
            return generated, logprobs, "length"


PROMPTS = {
    "text": [V.bos, 15, 20, 17],
    "image": [V.bos, 15, *IMAGE, 18],
    "two images": [V.bos, *IMAGE, 19, 16, V.begin_image, 10, 10, 11, 13, V.end_image, V.end_turn],
}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize("scales", [(3.0, 1.2), (1.0, 1.0), (2.0, 2.0), (2.0, 1.0), (1.0, 1.7), (0.0, 0.5)])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_tokens_equal_uncached_passes_with_the_papers_guidance(
    tiny: Tiny, prompt: str, mode: Any, scales: tuple[float, float], temperature: float
) -> None:
    for seed, kind in enumerate(KINDS):
        transformer = tiny(kind, seed)
        text, image = PhaseSampling(temperature, 0.95, 1.4), PhaseSampling(temperature, 0.8)
        params = SamplingParams(40, mode, 3, text, image, *scales, seed=seed)
        tokens, logprobs, finish = reference(transformer, PROMPTS[prompt], params)
        events = run(engine_of(transformer), Request("r", PROMPTS[prompt], params))["r"]
        assert tokens_of(events) == tokens
        assert [value for event in events for value in event.logprobs] == pytest.approx(logprobs, abs=1e-3)
        assert events[-1].finish == finish


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.5, 0.5), (0.75, 1.0)])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_guidance_of_a_part_of_an_image_equals_uncached_passes_and_frees_its_branches(
    tiny: Tiny, interval: tuple[float, float], schedule: Any
) -> None:
    """Whether codes are drawn one by one, in bursts, ahead, or drafted."""
    transformer = tiny(EAGER, 1)
    params = SamplingParams(
        30, "interleaved", 3, GREEDY, GREEDY_IMAGE, 4.0, 2.0, seed=1, guidance_begin=interval[0],
        guidance_end=interval[1], guidance_schedule=schedule,
    )  # fmt: skip
    tokens, logprobs, _ = reference(transformer, PROMPTS["image"], params)
    assert len(images_in(tokens)) >= 3
    for options in ({"image_burst": 1}, {"image_burst": 8}, {"ahead": True, "image_burst": 1}, {"jacobi_window": 3}):
        engine = engine_of(transformer, **options)
        events = run(engine, Request("r", PROMPTS["image"], params))["r"]
        assert tokens_of(events) == tokens
        assert [value for event in events for value in event.logprobs] == pytest.approx(logprobs, abs=1e-3)
        assert engine.statistics.blocks_used == 0
    guided = round(interval[1] * N) - round(interval[0] * N)
    engine, branches = engine_of(transformer, image_burst=1), list[int]()
    engine.add(Request("r", PROMPTS["image"], replace(params, mode="image", prefix=())))
    while engine.has_work:
        engine.step()
        branches += [len(state.branches) for state in engine._scheduler.running if state.drawing]
    # seen after each code: those that the first is drawn with are there before
    assert branches.count(2) == max(0, guided - (interval[0] == 0))


def many(seeded: bool) -> list[Request]:
    requests = []
    for number, (mode, prompt) in enumerate((m, p) for m in ("text", "image", "interleaved") for p in PROMPTS.values()):
        heat = 1.2 if seeded else 0.0
        params = SamplingParams(
            max_tokens=9 + 4 * number,
            mode=cast(Any, mode),
            text=PhaseSampling(heat, 0.6 + 0.04 * number, 1.0 + 0.1 * (number % 3)),
            image=PhaseSampling(heat, 1.0 - 0.05 * number),
            guidance_text=1.0 + number % 3,
            guidance_begin=0.25 * (number % 2),
            guidance_end=1 - 0.25 * (number % 3),
            guidance_schedule=cast(Any, ["constant", "linear", "cosine"][number % 3]),
            seed=number,
        )
        requests.append(Request(str(number), prompt, params))
    return requests


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("max_sequences", [3, 7, 27])
def test_a_request_does_not_notice_its_company(
    tiny: Tiny, kind: dict[int, float], seeded: bool, max_sequences: int
) -> None:
    transformer = tiny(kind)
    requests = many(seeded)
    alone = {request.id: answer(transformer, request) for request in requests}
    together = run(engine_of(transformer, max_sequences=max_sequences), *requests)
    assert {id: tokens_of(events) for id, events in together.items()} == alone


def test_joining_and_leaving_at_any_step_changes_nobody(tiny: Tiny) -> None:
    transformer = tiny(EAGER)
    requests = many(seeded=True)
    alone = {request.id: answer(transformer, request) for request in requests}
    engine = engine_of(transformer, max_sequences=6)
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    waiting = list(requests)
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps % 2 == 0:
            engine.add(waiting.pop())
        if steps in (5, 9):
            engine.add(Request(f"passer-by {steps}", PROMPTS["image"], SamplingParams(mode="image")))
        if steps in (8, 10):
            engine.abort("passer-by 5" if steps == 8 else "passer-by 9")
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        steps += 1
    assert {request.id: tokens_of(events[request.id]) for request in requests} == alone


@pytest.mark.parametrize(
    "options", [{"prefill_tokens": 1}, {"prefill_tokens": 5}, {"image_burst": 1}, {"image_burst": 3}]
)
def test_prefill_in_parts_and_bursts_of_codes_change_no_token(tiny: Tiny, options: dict[str, int]) -> None:
    transformer = tiny(EAGER)
    requests = many(seeded=True)
    expected = run(engine_of(transformer), *requests)
    found = run(engine_of(transformer, **options), *requests)
    for request in requests:
        assert tokens_of(found[request.id]) == tokens_of(expected[request.id])


def test_a_seed_repeats_and_another_differs(tiny: Tiny) -> None:
    transformer = tiny()

    def drawn(seed: int | None) -> list[int]:
        hot = PhaseSampling(1.5, 1.0)
        return answer(transformer, Request("r", PROMPTS["text"], SamplingParams(30, seed=seed, text=hot)))

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 1
    assert len({tuple(drawn(None)) for _ in range(8)}) > 1


def test_a_model_in_training_answers_without_dropout(tiny: Tiny) -> None:
    request = Request("r", PROMPTS["text"], SamplingParams(30, seed=1))
    expected = answer(tiny(TALKER), request)
    transformer = tiny(TALKER)
    transformer.train()
    assert answer(transformer, request) == expected


def test_fewer_tokens_are_a_prefix_of_more(tiny: Tiny) -> None:
    transformer = tiny(EAGER)
    short, long = (
        answer(transformer, Request("r", PROMPTS["text"], SamplingParams(max_tokens, seed=1))) for max_tokens in (3, 40)
    )
    assert (len(short), len(long)) == (3, 40)
    assert short == long[:3]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    mode=st.sampled_from(["text", "image", "interleaved"]),
    max_tokens=st.integers(1, 70),
    max_images=st.integers(0, 4),
    prompt=st.sampled_from(list(PROMPTS.values())),
    padding=st.integers(0, 40),
    guidance=st.sampled_from([1.0, 1.2, 3.0]),
    kind=st.sampled_from(KINDS),
)
def test_answers_follow_the_grammar(
    tiny: Tiny,
    seed: int,
    mode: Any,
    max_tokens: int,
    max_images: int,
    prompt: list[int],
    padding: int,
    guidance: float,
    kind: dict[int, float],
) -> None:
    hot = PhaseSampling(2.0, 1.0)
    params = SamplingParams(
        max_tokens, mode, max_images, text=hot, image=hot, guidance_text=guidance, guidance_image=guidance, seed=seed
    )
    prompt = prompt + [16] * padding
    engine = engine_of(tiny(kind))
    events = run(engine, Request("r", prompt, params))["r"]
    tokens = tokens_of(events)
    images = images_in(tokens)
    limit = min(max_tokens, CONTEXT - len(prompt))
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    if mode == "image":
        assert (len(images), len(tokens), events[-1].finish) == (1, N + 2, "stop")
    else:
        assert len(tokens) <= limit
        assert events[-1].finish == ("length" if len(tokens) == limit else "stop")
        assert len(images) <= (max_images if mode == "interleaved" else 0)
        if kind is EAGER and mode == "interleaved":  # begins wherever it may: as often as it fits, at once
            assert len(images) == min(max_images, limit // (N + 2))
            assert len(images_in(tokens[: len(images) * (N + 2)])) == len(images)
    for event in events:
        assert len(event.logprobs) == len(event.tokens)
        assert all(value <= 1e-5 for value in event.logprobs)
        assert all((token in V.text_ids) == (event.phase == "text") for token in event.tokens)
    assert engine.statistics.blocks_used == 0


def test_the_longest_prompts_that_fit_share_a_prefill_with_short_ones(tiny: Tiny) -> None:
    transformer = tiny(EAGER)
    params = SamplingParams(mode="image", text=GREEDY, image=GREEDY_IMAGE)
    prompts = [[V.bos] + [15 + i % 9 for i in range(n)] for n in (CONTEXT - N - 3, 30, 1, 45)]
    prompts.append([V.bos, *IMAGE, *[17] * (CONTEXT - 2 * N - 5)])
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    # in parts of 50, the end of the first goes with the second, which is longer than the room that is left behind it
    found = run(engine_of(transformer, prefill_tokens=50), *requests)
    for request in requests:
        assert tokens_of(found[request.id]) == reference(transformer, request.tokens, params)[0]


def test_sampled_frequencies_follow_the_temperature(tiny: Tiny) -> None:
    transformer = tiny()
    with torch.no_grad():
        logits_V = transformer(torch.tensor([PROMPTS["text"]]))[0, -1]
    allowed = [*V.text_ids, *sorted(STOPS)]
    temperature = 2.5
    expected = (logits_V[allowed] / temperature).softmax(-1)
    params = [SamplingParams(1, seed=seed, text=PhaseSampling(temperature, 1.0)) for seed in range(2000)]
    events = run(
        engine_of(transformer, max_sequences=500), *[Request(str(i), PROMPTS["text"], p) for i, p in enumerate(params)]
    )
    drawn = [tokens_of(e) for e in events.values()]
    for token, probability in zip(allowed, expected.tolist(), strict=True):
        if token not in STOPS:
            assert drawn.count([token]) / 2000 == pytest.approx(probability, abs=0.05)
