"""What a request forbids, biases and penalizes, compared with transformers' logits processors on plain passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as theirs

from calumma.model.config import ModelConfig
from calumma.model.generation import Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=40, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
TEXT = V.text_ids
PHASE = [*TEXT, V.eos, V.end_turn]
IMAGE = [V.begin_image, 7, 9, 13, 8, V.end_image]
PROMPTS = [[V.bos], [V.bos, 15, 20, 17], [V.bos, 15, 15, 16, *range(20, 30)]]


class Ending(Output):
    """Logits of a model that likes to stop."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., [V.eos, V.end_turn]] += 1
        return logits[..., columns or slice(None)]


@cache
def tiny() -> Transformer:
    config = ModelConfig(vocabulary_size=48, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Ending(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
    return transformer.eval()


def run(engine: Engine, *requests: Request) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


@torch.no_grad()
def reference(prompt: list[int], params: SamplingParams) -> tuple[list[int], list[float], int | None]:
    """Greedy tokens, their plain log-probabilities and the id that ended them, by transformers' processors in vLLM's
    order; presence and frequency by OpenAI's formula."""
    text, stops = params.text, [V.eos, V.end_turn, *params.stop_ids]
    ends = [V.eos, V.end_turn]
    processors: list[Any] = [theirs.SuppressTokensLogitsProcessor([t for t in range(48) if t not in PHASE])]
    if params.allowed_ids is not None:
        allowed = list(params.allowed_ids)
        processors.append(theirs.PrefixConstrainedLogitsProcessor(lambda *_: allowed, 1))
    if params.ignore_eos:
        processors.append(theirs.SuppressTokensLogitsProcessor(ends))
    if params.min_tokens:
        processors.append(
            theirs.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, stops)  # type: ignore[arg-type]
        )
    biases = [*params.logit_bias]
    if biases:
        processors.append(theirs.SequenceBiasLogitsProcessor({(id,): float(value) for id, value in biases}))
    penalty = theirs.RepetitionPenaltyLogitsProcessor(text.repetition_penalty)
    banned = theirs.NoBadWordsLogitsProcessor([list(w) for w in params.bad_words]) if params.bad_words else None
    answer: list[int] = []
    logprobs: list[float] = []
    while len(answer) < params.max_tokens:
        plain_V = tiny()(torch.tensor([prompt + answer]))[0, -1]
        ids = torch.tensor([prompt + answer])
        scores = plain_V[None].clone()
        for processor in processors:
            scores = processor(ids, scores)
        if banned is not None:  # the answer's own, as in vLLM
            scores = banned(torch.tensor([answer]), scores) if answer else banned(torch.tensor([[V.pad]]), scores)
        scores = penalty(ids, scores)
        for token in set(answer):
            scores[0, token] -= text.presence_penalty + answer.count(token) * text.frequency_penalty
        token = int(scores.argmax())
        masked_V = torch.full_like(plain_V, float("-inf"))
        masked_V[PHASE] = plain_V[PHASE]
        logprob = float(masked_V.log_softmax(-1)[token])
        if token in stops:
            return answer, [*logprobs, logprob], token
        answer.append(token)
        logprobs.append(logprob)
    return answer, logprobs, None


ids = st.sampled_from(TEXT)
options = st.fixed_dictionaries(
    {
        "stop_ids": st.lists(ids, max_size=2).map(tuple),
        "min_tokens": st.sampled_from([0, 0, 3, 12]),
        "ignore_eos": st.booleans(),
        "allowed_ids": st.none() | st.lists(ids, min_size=6, max_size=12).map(lambda some: (*some, V.eos)),
        "bad_words": st.lists(st.lists(ids, min_size=1, max_size=2).map(tuple), max_size=4).map(tuple),
        "logit_bias": st.dictionaries(
            st.sampled_from(PHASE), st.sampled_from([-100.0, -1.5, 0.0, 2.0, 9.0]), max_size=4
        ).map(lambda some: tuple(some.items())),
        "text": st.builds(
            PhaseSampling,
            temperature=st.just(0.0),
            repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
            presence_penalty=st.sampled_from([0.0, 0.8, -0.5]),
            frequency_penalty=st.sampled_from([0.0, 0.6, 2.0]),
        ),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mix=st.lists(st.tuples(st.sampled_from(PROMPTS), options), min_size=1, max_size=5))
def test_greedy_answers_are_what_transformers_processors_give(mix: list[tuple[list[int], dict[str, Any]]]) -> None:
    """In company of requests that ask for other things, some of nothing."""
    requests = [Request(str(number), prompt, SamplingParams(14, **asked)) for number, (prompt, asked) in enumerate(mix)]
    found = run(Engine(tiny(), V, N, block_size=4), *requests, Request("plain", PROMPTS[1], SamplingParams(14, seed=1)))
    for request in requests:
        try:
            answer, logprobs, stop = reference(request.tokens, request.params)
        except ValueError:  # transformers' word for a mask that leaves nothing
            continue
        events = found[request.id]
        if events[-1].failure is not None:
            assert events[-1].failure.kind == "no token"
            assert not_allowed(request, tokens_of(events))
            continue
        assert tokens_of(events) == answer
        values = [value for event in events for value in event.logprobs]
        assert values == pytest.approx(logprobs[: len(answer)], abs=1e-4)
        assert events[-1].finish == ("length" if stop is None else "stop")
        assert events[-1].stop_id == stop
        if stop is not None:
            assert events[-1].stop_logprob is not None
            assert events[-1].stop_logprob.value == pytest.approx(logprobs[-1], abs=1e-4)


def not_allowed(request: Request, answer: list[int]) -> bool:
    """Whether the request's own lists leave nothing after this."""
    params = request.params
    left = set(PHASE if params.allowed_ids is None else params.allowed_ids)
    left -= {word[-1] for word in params.bad_words if word[:-1] == tuple(answer[len(answer) - len(word) + 1 :])}
    left -= {V.eos, V.end_turn} if params.ignore_eos or len(answer) < params.min_tokens else set()
    return not left - (set(params.stop_ids) if len(answer) < params.min_tokens else set())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    mix=st.lists(st.tuples(st.integers(0, 2), options, st.integers(0, 99)), min_size=2, max_size=6),
    engines=st.fixed_dictionaries(
        {
            "max_sequences": st.sampled_from([1, 3, 8]),
            "prefill_tokens": st.sampled_from([3, 100]),
            "cache_tokens": st.sampled_from([64, 512]),
            "cuda_graphs": st.booleans(),
        }
    ),
)
def test_drawn_answers_are_the_same_in_any_company_and_after_preemption(
    mix: list[tuple[int, dict[str, Any], int]], engines: dict[str, Any]
) -> None:
    requests = []
    for number, (prompt, asked, seed) in enumerate(mix):
        heat = {"temperature": 1.2, "top_p": 0.9 if seed % 2 else 1.0}
        text = PhaseSampling(**{**asked["text"].__dict__, **heat})
        params = SamplingParams(20, **{**asked, "text": text}, seed=seed)
        requests.append(Request(str(number), PROMPTS[prompt], params))
    together = run(Engine(tiny(), V, N, block_size=4, **engines), *requests)
    for request in requests:
        (alone,) = run(Engine(tiny(), V, N), request).values()
        assert tokens_of(together[request.id]) == tokens_of(alone)
        assert together[request.id][-1].finish == alone[-1].finish


def test_mixes_of_penalties_do_preempt() -> None:
    """What the test above would be worth little without."""
    text = PhaseSampling(1.2, 1.0, 1.3, presence_penalty=0.5)
    requests = [
        Request(str(seed), PROMPTS[2], SamplingParams(20, text=text, ignore_eos=True, seed=seed)) for seed in range(5)
    ]
    engine = Engine(tiny(), V, N, block_size=4, cache_tokens=64)
    run(engine, *requests)
    assert engine.statistics.counters.preemptions > 0


def test_images_are_not_touched_and_may_be_forbidden() -> None:
    """Penalties, biases and lists hold for text; begin_image is an id of text."""
    prompt = [V.bos, 15, *IMAGE, 18]
    image = PhaseSampling(1.0)
    plain = SamplingParams(mode="image", image=image, seed=3)
    changed = SamplingParams(
        mode="image",
        image=image,
        seed=3,
        text=PhaseSampling(0.3, 0.5, 1.7, presence_penalty=2.0, frequency_penalty=2.0),
        logit_bias=((V.begin_image, -100.0), (20, 50.0)),
        allowed_ids=(20,),
        bad_words=((V.begin_image,),),
        ignore_eos=True,
    )
    engine = Engine(tiny(), V, N)
    found = run(engine, Request("plain", prompt, plain), Request("changed", prompt, changed))
    assert tokens_of(found["plain"]) == tokens_of(found["changed"])
    eager = ((V.begin_image, 60.0),)
    for more, images in (({}, 2), ({"bad_words": ((V.begin_image,),)}, 0), ({"allowed_ids": (20, V.begin_image)}, 2)):
        params = SamplingParams(20, "interleaved", 2, PhaseSampling(0.0), image, logit_bias=eager, seed=1, **more)
        (events,) = run(engine, Request("r", prompt, params)).values()
        assert tokens_of(events).count(V.begin_image) == images


def test_a_request_that_leaves_no_id_fails_alone() -> None:
    engine = Engine(tiny(), V, N)
    dead = SamplingParams(9, allowed_ids=(20, 21), bad_words=((20,), (21, 21)), text=PhaseSampling(0.0))
    found = run(engine, Request("dead", [V.bos], dead), Request("good", [V.bos], SamplingParams(9, seed=1)))
    assert tokens_of(found["dead"]) == [21]
    assert found["dead"][-1].failure is not None
    assert found["dead"][-1].failure.kind == "no token"
    assert found["good"][-1].finish in ("stop", "length")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_ids": (40,)}, "allowed_ids names id 40: ids lie in 0..39"),
        ({"bad_words": ((15, -1),)}, "bad_words names id -1: ids lie in 0..39"),
        ({"logit_bias": ((7, 1.0),)}, "logit_bias names id 7, an image code: it holds for text"),
        ({"min_tokens": 513}, "min_tokens 513 must be 512 or less"),
    ],
)
def test_ids_that_no_text_has_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(tiny(), V, N).add(Request("r", [V.bos], SamplingParams(**params)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_tokens": -1}, "min_tokens -1"),
        ({"allowed_ids": ()}, "names no id"),
        ({"bad_words": ((),)}, "without ids"),
        ({"logit_bias": ((15, 101.0),)}, "logit_bias 101.0 of id 15"),
        ({"logit_bias": ((15, float("nan")),)}, "logit_bias nan"),
        ({"logit_bias": ((15, 1.0), (15, 2.0))}, "names an id twice"),
        ({"logit_bias": tuple((token, 1.0) for token in range(1025))}, "1025 ids; 1024"),
        ({"text": {"presence_penalty": 2.1}}, "presence_penalty 2.1 must lie in -2..2"),
        ({"text": {"frequency_penalty": float("nan")}}, "frequency_penalty nan"),
        ({"image": {"presence_penalty": 1.0}}, "presence_penalty applies to text"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    def make() -> SamplingParams:
        phases = {name: PhaseSampling(**value) if isinstance(value, dict) else value for name, value in wrong.items()}
        return SamplingParams(**phases)

    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("penalty", [1e-40, 1e-30, 1e30, 1e38])
def test_no_penalty_is_too_large_for_numbers(penalty: float) -> None:
    text = PhaseSampling(1.0, 0.9, repetition_penalty=penalty, presence_penalty=2.0)
    (events,) = run(Engine(tiny(), V, N), Request("r", PROMPTS[2], SamplingParams(12, text=text, seed=2))).values()
    assert events[-1].failure is None
    assert all(token in TEXT for token in tokens_of(events))
