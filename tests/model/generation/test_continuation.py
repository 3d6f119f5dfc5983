"""An answer cut anywhere and given back as a prefix goes on as it would have: another engine can take it over."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation import Constraint, Engine, Event, PhaseSampling, Request, SamplingParams
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 80
V = Vocabulary(
    size=40, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 13, 8, V.end_image]
PROMPT = [V.bos, 15, 15, *IMAGE, 18, 20, 17]


class Stripes:
    """A grammar of ids: each one's remainder by 3 is the one before's plus 1; it may end after every third, and does
    after `most`."""

    def __init__(self, most: int, taken: int = 0) -> None:
        self.most, self.taken = most, taken

    @classmethod
    def of(cls, constraint: Constraint) -> Stripes:
        return cls(int(constraint.value))

    may_begin_image = False

    def fill_mask(self, mask_W: NDArray[np.int32]) -> None:
        may = np.zeros(len(mask_W) * 32, dtype=bool)
        if self.taken < self.most:
            may[[token for token in range(V.size) if token % 3 == self.taken % 3]] = True
        may[[V.eos, V.end_turn]] = self.taken % 3 == 0 or self.taken == self.most
        mask_W[:] = np.packbits(may, bitorder="little").view(np.int32)

    def advance(self, token: int) -> None:
        if token % 3 != self.taken % 3 or self.taken == self.most:
            raise ValueError(f"id {token} is not of stripe {self.taken % 3}")
        self.taken += 1

    def copy(self) -> Stripes:
        return Stripes(self.most, self.taken)


class Fond(Output):
    """Logits of a model that stops seldom and likes to begin images."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., [V.eos, V.end_turn]] -= 1
        logits[..., V.begin_image] += 2
        return logits[..., columns or slice(None)]


@cache
def tiny() -> Transformer:
    config = ModelConfig(vocabulary_size=48, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Fond(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.4, generator=generator)
    return transformer.eval()


def run(params: SamplingParams, company: int = 0, **options: Any) -> list[Event]:
    engine = Engine(tiny(), V, N, constraints=Stripes.of, **options)
    for number in range(company):
        other = SamplingParams(9, "interleaved", 2, PhaseSampling(1.2, 1.0, 1.3), seed=number)
        engine.add(Request(f"other {number}", PROMPT, other))
    engine.add(Request("r", PROMPT, params))
    events = []
    while engine.has_work:
        events += [event for event in engine.step() if event.request_id == "r"]
    return events


def flat(events: list[Event]) -> tuple[list[int], list[float], list[Any]]:
    tokens = [token for event in events for token in event.tokens]
    values = [value for event in events for value in event.logprobs]
    return tokens, values, [[id for id, _ in top] for event in events for top in event.top_logprobs]


parameters = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["text", "interleaved", "interleaved", "image"]),
        "max_tokens": st.sampled_from([1, 6, 13, 30]),
        "max_images": st.sampled_from([1, 3]),
        "text": st.builds(
            PhaseSampling,
            temperature=st.sampled_from([0.0, 1.2]),
            top_p=st.sampled_from([0.3, 0.9, 1.0]),
            repetition_penalty=st.sampled_from([1.0, 1.4]),
            top_k=st.sampled_from([0, 7]),
            presence_penalty=st.sampled_from([0.0, 1.1]),
            frequency_penalty=st.sampled_from([0.0, 0.7]),
        ),
        "image": st.builds(PhaseSampling, temperature=st.sampled_from([0.0, 1.0]), top_p=st.sampled_from([0.8, 1.0])),
        "guidance_text": st.sampled_from([1.0, 3.0]),
        "guidance_image": st.sampled_from([1.0, 1.2]),
        "seed": st.integers(-(2**63), 2**64 - 1).filter(lambda seed: seed != -1),
        "stop_ids": st.sampled_from([(), (21, 30)]),
        "logprobs": st.sampled_from([None, 3]),
        "min_tokens": st.sampled_from([0, 1]),
        "ignore_eos": st.booleans(),
        "bad_words": st.sampled_from([(), ((20,), (16, 17), (25, 26, 27))]),
        "logit_bias": st.sampled_from([(), ((19, 3.0), (V.eos, -2.0))]),
    }
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    given=parameters,
    most=st.none() | st.sampled_from([3, 12, 40]),
    cuts=st.lists(st.integers(0, 100), min_size=1, max_size=4),
    company=st.sampled_from([0, 3]),
    options=st.fixed_dictionaries(
        {
            "prefill_tokens": st.sampled_from([3, 100]),
            "image_burst": st.sampled_from([1, 3]),
            "block_size": st.sampled_from([4, 8]),
            "cache_tokens": st.sampled_from([256, 2048]),
            "cuda_graphs": st.booleans(),
            "ahead": st.booleans(),
        }
    ),
)
def test_an_answer_goes_on_from_any_cut(
    given: dict[str, Any], most: int | None, cuts: list[int], company: int, options: dict[str, Any]
) -> None:
    """The same ids, log-probabilities and end, from its first id to after its last."""
    if most is not None and given["mode"] != "image":
        given["constraint"] = Constraint("regex", str(most))
    whole = run(SamplingParams(**given))
    tokens, values, tops = flat(whole)
    for cut in {each % (len(tokens) + 1) for each in cuts}:
        events = run(SamplingParams(**given, prefix=tuple(tokens[:cut])), company, **options)
        went_on, again, also = flat(events)
        assert went_on == tokens
        assert again[cut:] == pytest.approx(values[cut:], abs=1e-4)
        assert also[cut:] == tops[cut:]
        end, expected = events[-1], whole[-1]
        # an end that comes without a further id is told by the prefix's last event
        assert (end.finish, end.stop_id) == (expected.finish, expected.stop_id)
        assert (end.stop_logprob is None) == (expected.stop_logprob is None)
        if end.stop_logprob is not None and expected.stop_logprob is not None:
            assert end.stop_logprob.value == pytest.approx(expected.stop_logprob.value, abs=1e-4)


def test_the_cuts_do_fall_everywhere() -> None:
    """What the test above would be worth little without: within guided images, in text after images, at the end."""
    params = SamplingParams(
        30, "interleaved", 3, PhaseSampling(1.2, 1.0, 1.4), PhaseSampling(1.0, 1.0), seed=2**40 + 1, ignore_eos=True
    )
    tokens, _, _ = flat(run(params))
    assert tokens.count(V.begin_image) >= 2
    assert any(token in V.text_ids for token in tokens[tokens.index(V.end_image) :])
    for cut in range(len(tokens) + 1):
        assert flat(run(SamplingParams(**{**params.__dict__, "prefix": tuple(tokens[:cut])})))[0] == tokens
    other = SamplingParams(**{**params.__dict__, "seed": 1})  # differs in the upper 32 bits alone
    assert flat(run(other))[0] != tokens


def test_a_prefix_that_its_grammar_does_not_allow_is_refused() -> None:
    engine = Engine(tiny(), V, N, constraints=Stripes.of)
    constraint = Constraint("regex", "9")
    engine.add(Request("right", [V.bos], SamplingParams(9, prefix=(15, 16), constraint=constraint)))
    with pytest.raises(ValueError, match="id 15 is not of stripe 1"):
        engine.add(Request("wrong", [V.bos], SamplingParams(9, prefix=(15, 15), constraint=constraint)))
    with pytest.raises(ValueError, match="compiles no grammars"):
        Engine(tiny(), V, N).add(Request("r", [V.bos], SamplingParams(9, constraint=constraint)))
    with pytest.raises(ValueError, match="mode 'image' has none"):
        SamplingParams(mode="image", constraint=constraint)


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(["text", "interleaved"]),
    most=st.integers(1, 20),
    min_tokens=st.sampled_from([0, 9]),
    ignore_eos=st.booleans(),
    heat=st.sampled_from([0.0, 1.2]),
    seed=st.integers(0, 99),
)
@example(mode="text", most=3, min_tokens=9, ignore_eos=True, heat=0.0, seed=0)
def test_answers_keep_to_their_grammar(
    mode: Any, most: int, min_tokens: int, ignore_eos: bool, heat: float, seed: int
) -> None:
    """Whatever else is asked for: special ids and images do not come, and what is complete ends."""
    params = SamplingParams(
        15,
        mode,
        text=PhaseSampling(heat, 1.0),
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        seed=seed,
        constraint=Constraint("regex", str(most)),
    )
    events = run(params, company=2)
    tokens, _, _ = flat(events)
    assert all(token in V.text_ids and token % 3 == number % 3 for number, token in enumerate(tokens))
    assert len(tokens) <= min(most, 15)
    if len(tokens) < 15:
        assert events[-1].finish == "stop"
        assert events[-1].stop_id in (V.eos, V.end_turn)
        assert len(tokens) == most or (len(tokens) % 3 == 0 and len(tokens) >= min_tokens and not ignore_eos)


def test_a_grammar_that_breaks_down_costs_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, advance = Stripes.fill_mask, Stripes.advance
    params = SamplingParams(9, seed=1, constraint=Constraint("regex", "40"), ignore_eos=True)
    expected = flat(run(params))[0]

    def broken(self: Stripes, given: Any) -> None:
        if self.most == 41 and self.taken == 2:
            raise ValueError("too complex")
        (fill if isinstance(given, np.ndarray) else advance)(self, given)

    for name in ("fill_mask", "advance"):
        with monkeypatch.context() as patch:
            patch.setattr(Stripes, name, broken)
            engine = Engine(tiny(), V, N, constraints=Stripes.of)
            engine.add(Request("good", PROMPT, params))
            bad = SamplingParams(9, seed=1, constraint=Constraint("regex", "41"), ignore_eos=True)
            engine.add(Request("bad", PROMPT, bad))
            found: dict[str, list[Event]] = {"good": [], "bad": []}
            while engine.has_work:
                for event in engine.step():
                    found[event.request_id].append(event)
        assert flat(found["good"])[0] == expected
        assert flat(found["bad"])[0] == expected[:2]
        assert found["bad"][-1].failure is not None
        assert "too complex" in found["bad"][-1].failure.message
