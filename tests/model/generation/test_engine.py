"""Life with the engine: who waits, who is refused, who leaves, and what is computed; tokens are compared elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from calumma.model.generation import Engine, Event, PhaseSampling, PromptTooLong, Request, SamplingParams
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
CONTEXT = 64
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
IMAGE = [V.begin_image, 7, 9, 14, 8, V.end_image]
PLAIN = [V.bos, 15, 20, 17]
WITH_IMAGE = [V.bos, 15, *IMAGE, 18]
GREEDY = PhaseSampling(temperature=0, repetition_penalty=1.3)


@pytest.fixture
def transformer(make_transformer: Callable[..., Transformer]) -> Transformer:
    """Begins an image wherever it may, and never stops."""
    bias = {V.begin_image: 100, V.eos: -100, V.end_turn: -100}
    return make_transformer(V.size, bias=bias, width=16, heads=2, kv_heads=1, ffn_width=24)


def engine_of(transformer: Transformer, **options: Any) -> Engine:
    return Engine(transformer, V, N, **options)


def run(engine: Engine, *requests: Request) -> list[Event]:
    """Add all and step to the end."""
    for request in requests:
        engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def answer(transformer: Transformer, request: Request) -> list[int]:
    return tokens_of(run(engine_of(transformer), request))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the number of tokens of each forward pass."""
    seen: list[int] = []
    hidden = Decoder.hidden

    def counted(self: Decoder, tokens_T: Tensor, paged: Any, *adapters: Any) -> Tensor:
        seen.append(len(tokens_T))
        return hidden(self, tokens_T, paged, *adapters)

    monkeypatch.setattr(Decoder, "hidden", counted)
    return seen


def test_a_second_image_computes_nothing_again_and_unneeded_branches_never_run(
    transformer: Transformer, passes: list[int]
) -> None:
    params = SamplingParams(2 * (N + 2), "interleaved", 2, text=GREEDY, guidance_text=3.0, guidance_image=1.2)
    run(engine_of(transformer, block_size=4), Request("r", [V.bos], params))
    # bos; f with u's two; codes of both; last code and end; f, what i lacks of u's blocks (last code, end, begin), u
    first = [1, 3, *[2] * (N - 1), 2]
    second = [1 + 3 + 1, *[3] * (N - 1)]
    assert passes == [*first, *second]
    passes.clear()
    run(engine_of(transformer), Request("r", [V.bos, *IMAGE], SamplingParams(mode="image", guidance_image=3.0)))
    assert passes == [8 + 2, *[2] * (N - 1)]  # equal scales cancel branch i
    passes.clear()
    run(engine_of(transformer), Request("r", [V.bos], SamplingParams(mode="image", guidance_text=1.0)))
    assert passes == [2, *[1] * (N - 1)]  # no image before: i is u, and f is left alone; the end needs no pass


def test_prompts_that_begin_alike_are_computed_once(transformer: Transformer, passes: list[int]) -> None:
    engine = engine_of(transformer, block_size=4)
    system = [V.bos, *range(15, 26), *range(15, 20)]
    requests = [Request(str(i), [*system, 20 + i], SamplingParams(1)) for i in range(3)]
    run(engine, *requests)
    assert passes == [18, 2]  # the others wait for the first, and lack but the tokens they do not share
    assert engine.statistics.prefix_hit_tokens == 2 * 17
    passes.clear()
    run(engine, Request("again", requests[0].tokens, SamplingParams(1)))
    assert passes == [1]
    passes.clear()
    run(engine_of(transformer, block_size=4, prefix_cache=False), *requests)
    assert passes == [3 * 18]


def test_what_is_computed_for_a_request_does_not_tell_what_other_salts_have_asked(
    transformer: Transformer, passes: list[int]
) -> None:
    """Images and their guidance branches, a whole prompt, one that agrees in part, one that is being computed."""
    secret = Request(
        "secret", [*WITH_IMAGE, *range(15, 26)], SamplingParams(2 * (N + 2), "interleaved", 2, seed=7), salt=b"a"
    )
    guesses = [
        Request("same", secret.tokens, secret.params, salt=b"b"),
        Request("part", [*secret.tokens[:9], 20], SamplingParams(1, seed=7), salt=b"b"),
        Request("none", secret.tokens, secret.params),
    ]
    for guess in guesses:
        engine = engine_of(transformer, block_size=4)
        alone = (tokens_of(run(engine, guess)), list(passes), engine.statistics.prefix_hit_tokens)
        passes.clear()
        engine = engine_of(transformer, block_size=4)
        run(engine, secret)
        hits = engine.statistics.prefix_hit_tokens
        passes.clear()
        after = (tokens_of(run(engine, guess)), list(passes), engine.statistics.prefix_hit_tokens - hits)
        assert after == alone
        passes.clear()
        engine = engine_of(transformer, block_size=4)
        run(engine, replace(secret, params=SamplingParams(1)), replace(guess, params=SamplingParams(1)))
        assert passes == [len(secret.tokens) + len(guess.tokens)], "nobody waits for what another salt computes"
        passes.clear()
    engine = engine_of(transformer, block_size=4)
    run(engine, secret)
    passes.clear()
    run(engine, replace(guesses[1], salt=b"a"))
    assert passes == [1], "what its own salt has is found"


def test_a_conversation_goes_on_where_its_last_answer_ended(transformer: Transformer, passes: list[int]) -> None:
    engine = engine_of(transformer, block_size=4)
    first = tokens_of(run(engine, Request("first", PLAIN, SamplingParams(9, text=GREEDY))))
    passes.clear()
    run(engine, Request("second", [*PLAIN, *first, 15, 16], SamplingParams(1)))
    assert passes == [3]  # the answer's last token was never computed


def test_abort_frees_the_blocks_at_once_and_disturbs_nobody(transformer: Transformer) -> None:
    kept = Request("kept", PLAIN, SamplingParams(20, text=GREEDY))
    expected = answer(transformer, kept)
    engine = engine_of(transformer, max_sequences=2, cache_tokens=256)
    engine.add(kept)
    engine.add(Request("running", WITH_IMAGE, SamplingParams(mode="image")))
    engine.add(Request("waiting", WITH_IMAGE, SamplingParams(mode="image")))
    events = engine.step()
    assert (engine.running, engine.waiting, engine.statistics.blocks_used) == (2, 1, 4)
    engine.abort("waiting")
    engine.abort("running")
    engine.abort("running")
    engine.abort("never seen")
    events += engine.step()
    assert (engine.waiting, engine.statistics.blocks_used) == (0, 1)
    while engine.has_work:
        events += engine.step()
    assert [(e.request_id, e.tokens) for e in events if e.finish == "aborted"] == [("waiting", []), ("running", [])]
    assert tokens_of([e for e in events if e.request_id == "kept"]) == expected
    assert engine.statistics.blocks_used == 0
    engine.add(Request("running", WITH_IMAGE, SamplingParams(mode="image")))  # the id is free again


def test_refused_requests_disturb_nobody(transformer: Transformer) -> None:
    kept = Request("kept", PLAIN, SamplingParams(20, text=GREEDY))
    expected = answer(transformer, kept)
    engine = engine_of(transformer, cache_tokens=64)
    engine.add(kept)
    events = engine.step()
    with pytest.raises(PromptTooLong, match=r"64 tokens and 1 for an answer .* context of 64"):
        engine.add(Request("long", [V.bos] * CONTEXT))
    with pytest.raises(PromptTooLong, match=r"59 tokens and the 6 of an image .* context of 64"):
        engine.add(Request("long", [V.bos] * (CONTEXT - N - 1), SamplingParams(mode="image")))
    with pytest.raises(ValueError, match=r"may need 96 positions .* image guidance; it has 64"):
        engine.add(Request("wide", WITH_IMAGE, SamplingParams(mode="image")))
    with pytest.raises(ValueError, match="'kept' is being answered"):
        engine.add(kept)
    with pytest.raises(ValueError, match="no tokens"):
        engine.add(Request("empty", []))
    with pytest.raises(ValueError, match=r"0\.\.27: 0\.\.28"):
        engine.add(Request("foreign", [V.bos, V.size]))
    with pytest.raises(ValueError, match=r"image at token 1 .* not whole"):
        engine.add(Request("cut", [V.bos, *IMAGE[:-1], 15]))
    while engine.has_work:
        events += engine.step()
    assert tokens_of(events) == expected
    assert {event.request_id for event in events} == {"kept"}


def test_a_long_prompt_does_not_hold_up_those_who_are_answered(transformer: Transformer) -> None:
    engine = engine_of(transformer, prefill_tokens=8)
    engine.add(Request("image", [V.bos], SamplingParams(mode="image")))
    engine.add(Request("text", [V.bos], SamplingParams(20)))
    engine.step()
    for name, token in (("first", 16), ("second", 17)):  # 20 tokens each to take in, and 8 a step
        engine.add(Request(name, [V.bos] + [token] * 20, SamplingParams(4)))
    steps = [[event.request_id for event in engine.step()] for _ in range(5)]
    both = ["image", "text"]
    assert [sorted(step) for step in steps] == [
        both,
        both,
        ["first", *both],
        ["first", "text"],
        ["first", "second", "text"],
    ]


def test_codes_come_in_bursts_only_while_nobody_else_could_move(transformer: Transformer) -> None:
    engine = engine_of(transformer, prefill_tokens=8)
    engine.add(Request("image", [V.bos], SamplingParams(mode="image")))
    engine.add(Request("long", [V.bos] + [16] * 20, SamplingParams(mode="image")))
    steps = [{event.request_id: len(event.tokens) for event in engine.step()} for _ in range(4)]
    assert steps == [{"image": 2}, {"image": 1}, {"image": 1, "long": 2}, {"image": 2, "long": 1}]


def test_the_oldest_takes_blocks_from_the_youngest(transformer: Transformer) -> None:
    engine = engine_of(transformer, block_size=4, cache_tokens=48, prefix_cache=False)
    requests = [Request(str(i), PLAIN, SamplingParams(28, text=GREEDY)) for i in range(3)]
    events = run(engine, *requests)
    assert [event.request_id for event in events if event.finish] == ["0", "1", "2"]
    assert engine.statistics.counters.preemptions > 0
    expected = answer(transformer, requests[0])
    assert all(tokens_of([e for e in events if e.request_id == request.id]) == expected for request in requests)


def test_a_broken_model_says_so(transformer: Transformer) -> None:
    with torch.no_grad():
        transformer.norm.weight.fill_(float("nan"))
    (event,) = run(engine_of(transformer), Request("r", [V.bos], SamplingParams()))
    assert (event.finish, event.tokens) == ("failed", [])
    assert event.failure is not None
    assert event.failure.kind == "not finite"
    assert "not numbers" in event.failure.message


def test_more_requests_than_seats_all_finish(transformer: Transformer) -> None:
    engine = engine_of(transformer, max_sequences=3)
    modes = ["interleaved", "image", "text"]
    requests = [
        Request(str(i), [PLAIN, WITH_IMAGE][i % 2], SamplingParams(30, cast(Any, modes[i % 3]), seed=i))
        for i in range(12)
    ]
    events = run(engine, *requests)
    finished = [event.request_id for event in events if event.finish in ("stop", "length")]
    assert sorted(finished) == sorted(request.id for request in requests)
    assert engine.statistics.blocks_used == 0
    assert engine.step() == []
