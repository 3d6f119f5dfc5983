"""Passes that are issued before the one before is read: what they change, which is when things happen, and nothing else
(test_mixes.py, test_faults.py and test_continuation.py draw with and without them)."""

from __future__ import annotations

from typing import Any

import pytest

from calumma.model.generation import Engine, PhaseSampling, Request, SamplingParams
from calumma.model.generation.passes.ahead import AheadPasses
from calumma.model.vocabulary import Vocabulary
from tests.model.generation.conftest import MakeTransformer, RunEngine

N = 4
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)
Log = list[tuple[str, int]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is issued and read, with how many passes are unread then."""
    found: Log = []
    issue, read = AheadPasses.issue, AheadPasses.read

    def issued(ahead: AheadPasses) -> None:
        found.append(("issue", ahead.unread))
        issue(ahead)

    def was_read(ahead: AheadPasses) -> Any:
        found.append(("read", ahead.unread))
        return read(ahead)

    monkeypatch.setattr(AheadPasses, "issue", issued)
    monkeypatch.setattr(AheadPasses, "read", was_read)
    return found


def texts(count: int, length: int, **fields: Any) -> list[Request]:
    params = {"text": PhaseSampling(1.2, 0.9, 1.3, presence_penalty=0.5), "ignore_eos": False, **fields}
    return [
        Request(str(number), [V.bos, 15 + number], SamplingParams(length, seed=number, **params))
        for number in range(count)
    ]


def tokens(events: dict[str, list[Any]]) -> dict[str, list[int]]:
    return {id: [token for event in own for token in event.tokens] for id, own in events.items()}


def test_the_next_pass_is_issued_before_a_pass_is_read(
    make_transformer: MakeTransformer, run_engine: RunEngine, log: Log
) -> None:
    """And after the last there is no other: the host knows that an answer ends by its length."""
    engine = Engine(make_transformer(V.size, bias={V.eos: -99, V.end_turn: -99}), V, N, ahead=True)
    found = run_engine(engine, *texts(3, 9))
    assert log[0] == ("issue", 0)
    assert log[1:-1] == [("issue", 1), ("read", 2)] * 7
    assert log[-1] == ("read", 1)
    assert engine.statistics.counters.steps == 1 + 8, "the first took the prompts in and drew"
    assert tokens(found) == tokens(run_engine(Engine(engine_transformer(engine), V, N, ahead=False), *texts(3, 9)))


def engine_transformer(engine: Engine) -> Any:
    return engine._runner.decoder.transformer


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_what_is_drawn_for_who_has_ended_is_cut_back(
    make_transformer: MakeTransformer, run_engine: RunEngine, log: Log, mode: Any
) -> None:
    """Stop ids and images come as they would, with penalties and log-probabilities; others keep what they have drawn
    meanwhile; nothing is left behind."""
    transformer = make_transformer(V.size, bias={V.eos: -1.0, V.begin_image: 1.5})
    requests = texts(8, 30, mode=mode, logprobs=2, stop_ids=(20,) if mode == "interleaved" else ())
    plain = Engine(transformer, V, N, ahead=False, block_size=4)
    ahead = Engine(transformer, V, N, ahead=True, block_size=4)
    expected, found = run_engine(plain, *requests), run_engine(ahead, *requests)
    assert ("issue", 1) in log
    for id, events in expected.items():
        told = [(e.finish, e.stop_id, e.stop_logprob is None) for e in (events[-1], found[id][-1])]
        assert told[0] == told[1]
        values = [[value for e in own for value in e.logprobs] for own in (events, found[id])]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert tokens(found) == tokens(expected)
    assert "stop" in {events[-1].finish for events in expected.values()}
    assert any(V.end_image in own for own in tokens(found).values()) == (mode == "interleaved")
    wasted = ahead.statistics.counters.steps - plain.statistics.counters.steps
    assert 0 <= wasted <= len(requests) + sum(own.count(V.end_image) for own in tokens(found).values())
    assert ahead.statistics.blocks_used == 0


def test_nothing_is_issued_ahead_of_who_waits_or_of_a_rule(
    make_transformer: MakeTransformer, run_engine: RunEngine, log: Log
) -> None:
    """A free seat is not kept from a request that comes, an abort is heard, and ids that a rule must be asked about
    are looked at first."""
    transformer = make_transformer(V.size, bias={V.eos: -99, V.end_turn: -99})
    run_engine(Engine(transformer, V, N, ahead=True), *texts(2, 9, bad_words=((17, 18),)))
    assert log == []
    engine = Engine(transformer, V, N, ahead=True)
    one, two, three = texts(3, 30)
    engine.add(one)
    for _ in range(4):
        engine.step()
    engine.add(two)
    engine.step()
    assert engine.running == 2
    engine.abort("0")
    assert [event.finish for event in engine.step() if event.request_id == "0"][-1] == "aborted"
    engine.add(three)
    ended = [event.request_id for _ in iter(lambda: engine.has_work, False) for event in engine.step() if event.finish]
    assert sorted(ended) == ["1", "2"]
    assert engine.statistics.blocks_used == 0


def test_a_full_house_goes_on_ahead_while_others_wait(
    make_transformer: MakeTransformer, run_engine: RunEngine, log: Log
) -> None:
    """Who waits could not be taken in anyway; unless another tenant's turn has come."""
    engine = Engine(make_transformer(V.size, bias={V.eos: -99, V.end_turn: -99}), V, N, 2, ahead=True)
    run_engine(engine, *texts(6, 9))
    assert log.count(("issue", 1)) == 3 * 7
    assert engine.statistics.counters.preemptions == 0


def test_a_pass_that_cannot_be_issued_or_read_changes_nothing(
    make_transformer: MakeTransformer, run_engine: RunEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = make_transformer(V.size, bias={V.eos: -99, V.end_turn: -99})
    expected = tokens(run_engine(Engine(transformer, V, N, ahead=False), *texts(3, 12)))
    for name in ("issue", "read"):
        original, calls = getattr(AheadPasses, name), []

        def failing(ahead: AheadPasses, original: Any = original, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) % 3 == 0:
                raise RuntimeError("out of luck")
            return original(ahead)

        with monkeypatch.context() as patch:
            patch.setattr(AheadPasses, name, failing)
            engine = Engine(transformer, V, N, ahead=True)
            assert tokens(run_engine(engine, *texts(3, 12))) == expected
            assert len(calls) >= 3
            assert engine.statistics.counters.failed == 0
