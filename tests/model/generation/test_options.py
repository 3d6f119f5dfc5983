"""Forced beginnings, further stop ids and log-probabilities, compared with plain forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 14, 8, V.end_image]
PROMPT = [V.bos, 15, *IMAGE, 18, 20, 17, 22, 15, 16]
GREEDY = PhaseSampling(temperature=0)
ALLOWED = [*V.text_ids, V.eos, V.end_turn]


@pytest.fixture(scope="module")
def transformer(make_transformer: Callable[..., Transformer]) -> Transformer:
    """Never stops, and likes to begin images."""
    return make_transformer(30, seed=3, bias={V.eos: -50, V.end_turn: -50, V.begin_image: 2})


def events_of(transformer: Transformer, prompt: list[int], params: SamplingParams, **options: Any) -> list[Event]:
    engine = Engine(transformer, V, N, **options)
    engine.add(Request("r", prompt, params))
    return [event for _ in iter(lambda: engine.has_work, False) for event in engine.step()]


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


@torch.no_grad()
def logprobs_after(transformer: Transformer, context: list[int], ids: list[int] | None = None) -> Tensor:
    """FloatTensor [V], -inf beside the given ids."""
    logits = transformer(torch.tensor([context]))[0, -1]
    masked = (
        logits if ids is None else torch.full_like(logits, float("-inf")).index_copy(0, torch.tensor(ids), logits[ids])
    )
    return masked.log_softmax(-1)


def test_the_likeliest_ids_of_each_text_token_are_reported(transformer: Transformer) -> None:
    """Before penalty, temperature and filters, among what may be said."""
    hot = PhaseSampling(1.5, 0.9, repetition_penalty=2.0)
    events = events_of(transformer, PROMPT, SamplingParams(8, text=hot, logprobs=3, seed=5))
    context, seen = list(PROMPT), 0
    for event in events:
        for token, value, top in zip(event.tokens, event.logprobs, event.top_logprobs, strict=True):
            expected = logprobs_after(transformer, context, ALLOWED)
            assert value == pytest.approx(float(expected[token]), abs=1e-4)
            best = expected.topk(3)
            assert [id for id, _ in top] == best.indices.tolist()
            assert [v for _, v in top] == pytest.approx(best.values.tolist(), abs=1e-4)
            context.append(token)
            seen += 1
    assert seen > 2


def test_the_likeliest_codes_are_reported_and_forced_ids_have_none(transformer: Transformer) -> None:
    params = SamplingParams(mode="image", image=PhaseSampling(1.0), guidance_text=3.0, logprobs=64, seed=1)
    (tokens, tops) = zip(
        *[pair for e in events_of(transformer, PROMPT, params) for pair in zip(e.tokens, e.top_logprobs, strict=True)],
        strict=True,
    )
    assert len(tokens) == N + 2
    assert tops[0] == tops[-1] == ()
    for top in tops[1:-1]:
        assert sorted(id for id, _ in top) == V.image_ids  # no more than may come
        assert sum(torch.tensor([value for _, value in top]).exp()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 3, "block_size": 4}])
def test_a_prompt_is_scored_as_by_one_plain_pass(transformer: Transformer, options: dict[str, int]) -> None:
    engine = Engine(transformer, V, N, **options)
    for number, max_tokens in enumerate((0, 3, 0)):  # also where the cache holds the prompt already
        engine.add(Request(str(number), PROMPT, SamplingParams(max_tokens, text=GREEDY, prompt_logprobs=2)))
        events = [event for _ in iter(lambda: engine.has_work, False) for event in engine.step()]
        scored = events[0].prompt_logprobs
        assert scored is not None
        assert len(scored) == len(PROMPT) - 1
        for position, (token, found) in enumerate(zip(PROMPT[1:], scored, strict=True), start=1):
            expected = logprobs_after(transformer, PROMPT[:position])
            assert found.value == pytest.approx(float(expected[token]), abs=1e-4)
            assert [id for id, _ in found.top] == expected.topk(2).indices.tolist()
        assert len(tokens_of(events)) == max_tokens
        assert events[-1].finish == "length"
        assert all(event.prompt_logprobs is None for event in events[1:])


def test_a_preempted_prompt_is_scored_once(transformer: Transformer) -> None:
    engine = Engine(transformer, V, N, block_size=4, cache_tokens=64)
    params = SamplingParams(30, text=PhaseSampling(1.0, 1.0), prompt_logprobs=0, seed=1)
    for number in range(3):
        engine.add(Request(str(number), PROMPT, params))
    events = [event for _ in iter(lambda: engine.has_work, False) for event in engine.step()]
    scores = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert [len(score) for score in scores] == [len(PROMPT) - 1] * 3
    assert engine.statistics.counters.preemptions > 0


def test_an_answer_begins_with_an_image_where_it_is_forced_to(transformer: Transformer) -> None:
    params = SamplingParams(20, "interleaved", 1, GREEDY, GREEDY, prefix=(V.begin_image,), seed=1)
    tokens = tokens_of(events_of(transformer, PROMPT, params))
    assert tokens[0] == V.begin_image
    assert tokens[N + 1] == V.end_image
    image = tokens_of(events_of(transformer, PROMPT, SamplingParams(mode="image", image=GREEDY)))
    assert tokens[: N + 2] == image
    begun = SamplingParams(mode="image", image=GREEDY, prefix=tuple(image[:3]))
    assert tokens_of(events_of(transformer, PROMPT, begun)) == image


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_an_answer_goes_on_from_its_forced_beginning_as_from_its_own(transformer: Transformer, mode: Any) -> None:
    """The same ids, penalties and random numbers as where they were drawn."""
    hot = PhaseSampling(1.2, 0.9, repetition_penalty=1.5)
    params = {"mode": mode, "max_images": 3, "text": hot, "image": PhaseSampling(1.0), "seed": 4}
    whole = tokens_of(events_of(transformer, PROMPT, SamplingParams(30, **params)))
    assert len(whole) > 3
    for cut in range(1, len(whole) + 1):
        prefix = tuple(whole[:cut])
        events = events_of(transformer, PROMPT, SamplingParams(30, **params, prefix=prefix))
        assert tokens_of(events) == whole
        assert all((token in V.text_ids) == (event.phase == "text") for event in events for token in event.tokens)


@pytest.mark.parametrize(
    ("mode", "prefix", "message"),
    [
        ("text", (V.begin_image,), "begins an image that mode 'text'"),
        ("text", (15, V.eos), "token 1 of the prefix, id 2, cannot stand"),
        ("image", (15,), "cannot stand in an answer of mode 'image'"),
        ("image", (*IMAGE, 15), "7 tokens: the answer may have 6"),
        ("interleaved", (V.begin_image, 15), "begins an image that is not: 4 codes"),
        ("interleaved", tuple([15] * 21), "21 tokens: the answer may have 20"),
        ("interleaved", (*[15] * 15, V.begin_image), "does not allow"),
    ],
)
def test_a_forced_beginning_that_no_answer_has_is_refused(
    transformer: Transformer, mode: Any, prefix: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        events_of(transformer, PROMPT, SamplingParams(20, mode, prefix=prefix))


def test_further_stop_ids_end_an_answer_unreported(transformer: Transformer) -> None:
    whole = tokens_of(events_of(transformer, PROMPT, SamplingParams(20, text=GREEDY)))
    stop = next(token for token in whole[1:] if token != whole[0])
    events = events_of(transformer, PROMPT, SamplingParams(20, text=GREEDY, stop_ids=(stop, 6)))
    assert tokens_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish == "stop"


def test_statistics_tell_what_was_done_and_what_is_held(transformer: Transformer) -> None:
    engine = Engine(transformer, V, N, max_sequences=2, block_size=4, cache_tokens=400)
    greedy = {"text": GREEDY, "image": GREEDY}
    for number, mode in enumerate(("image", "text", "text")):
        engine.add(Request(str(number), PROMPT, SamplingParams(3, mode, **greedy)))
    assert (engine.statistics.waiting, engine.statistics.waiting_tokens) == (3, 3 * len(PROMPT))
    engine.step()
    now = engine.statistics
    assert (now.running_image, now.running_text, now.waiting) == (1, 0, 2)  # who shares the prompt waits for it
    assert now.blocks == now.blocks_used + now.blocks_free + now.blocks_cached == 100
    texts = [event for _ in iter(lambda: engine.has_work, False) for event in engine.step() if event.request_id != "0"]
    end = engine.statistics
    assert (end.blocks_used, end.running_text, end.running_image, end.waiting) == (0, 0, 0, 0)
    assert end.blocks_cached > 0
    assert end.prefix_hit_tokens > 0
    counters = end.counters
    assert (counters.image_tokens, counters.images, counters.finished) == (N + 2, 1, 3)
    assert counters.text_tokens == len(tokens_of(texts))
    assert counters.prompt_tokens == 3 * len(PROMPT)
    assert counters.computed_tokens > counters.text_tokens
    assert end.acceptance == 0
