"""An engine on a thread takes requests in without holding up those under way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from calumma.model import MixedModalModel
from calumma.model.document import Document
from calumma.model.generation import Constraint, Request, SamplingParams
from calumma.model.tokenizers.grammar import GrammarCompiler, TokenGrammar
from calumma.serve.protocol import Finished, GenerationRequest, RequestFailed
from calumma.serve.replica.engine.client import Admitted, EngineOutput
from calumma.serve.replica.engine.thread import COMPILERS, EngineThread

PATIENCE = 300
SLOW, WRONG = Constraint("regex", "slow"), Constraint("regex", "wrong (")
Heard = "queue.Queue[tuple[str, EngineOutput]]"


class SlowCompiler(GrammarCompiler):
    """Takes as long for SLOW and WRONG as the test wants."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    def __call__(self, constraint: Constraint) -> TokenGrammar:
        self.begun.release()
        assert self.go_on.wait(PATIENCE)
        return super().__call__(constraint)


@pytest.fixture
def engine(model: MixedModalModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineThread]:
    monkeypatch.setattr("calumma.serve.replica.engine.thread.GrammarCompiler", SlowCompiler)
    engine = EngineThread(model, 4)
    yield engine
    compiler_of(engine).go_on.set()
    engine.close()


def compiler_of(engine: EngineThread) -> SlowCompiler:
    assert isinstance(engine._compiler, SlowCompiler)
    return engine._compiler


def submit(engine: EngineThread, id: str, heard: Heard, constraint: Constraint | None = None) -> None:
    params = SamplingParams(4, constraint=constraint, seed=1, ignore_eos=True)
    asked = GenerationRequest(id, Document(()), params)
    engine.submit(Request(id, [engine._model.vocabulary.bos], params), asked, lambda output: heard.put((id, output)))


def until_end(heard: Heard) -> list[tuple[str, EngineOutput]]:
    found = [heard.get(timeout=PATIENCE)]
    while not isinstance(found[-1][1], Finished | RequestFailed):
        found.append(heard.get(timeout=PATIENCE))
    return found


def test_a_grammar_that_is_slow_to_compile_holds_up_no_other_request(engine: EngineThread) -> None:
    heard: Heard = queue.Queue()
    submit(engine, "slow", heard, SLOW)
    assert compiler_of(engine).begun.acquire(timeout=PATIENCE)
    submit(engine, "plain", heard)
    assert {id for id, _ in until_end(heard)} == {"plain"}, "it begins and ends while the grammar is compiled"
    assert engine.running == 1
    compiler_of(engine).go_on.set()
    found = until_end(heard)
    assert {id for id, _ in found} == {"slow"}
    assert isinstance(found[0][1], Admitted)
    assert isinstance(found[-1][1], Finished)


def test_a_grammar_that_is_none_is_refused_and_an_id_is_used_once(engine: EngineThread) -> None:
    heard: Heard = queue.Queue()
    submit(engine, "wrong", heard, WRONG)
    submit(engine, "wrong", heard, WRONG)
    submit(engine, "wrong", heard)
    for _ in range(2):
        [(_, twice)] = until_end(heard)
        assert isinstance(twice, RequestFailed)
        assert "is being answered" in twice.message
    compiler_of(engine).go_on.set()
    [(_, refused)] = until_end(heard)
    assert isinstance(refused, RequestFailed)
    assert refused.status == 400
    assert "the regular expression cannot be followed" in refused.message
    assert not engine.running


def test_a_request_is_aborted_while_its_grammar_is_compiled(engine: EngineThread) -> None:
    heard: Heard = queue.Queue()
    submit(engine, "slow", heard, SLOW)
    assert compiler_of(engine).begun.acquire(timeout=PATIENCE)
    engine.abort("slow")
    assert not engine.running
    compiler_of(engine).go_on.set()
    submit(engine, "plain", heard)
    assert {id for id, _ in until_end(heard)} == {"plain"}


def test_an_engine_that_closes_tells_those_whose_grammars_are_not_compiled(engine: EngineThread) -> None:
    heard: Heard = queue.Queue()
    for number in range(COMPILERS + 1):
        submit(engine, str(number), heard, SLOW)
    engine.close()
    ended = [until_end(heard) for _ in range(COMPILERS + 1)]
    assert all(isinstance(output, RequestFailed) and output.status == 503 for [(_, output)] in ended)
    submit(engine, "late", heard, SLOW)
    [(_, late)] = until_end(heard)
    assert isinstance(late, RequestFailed)
    assert late.status == 503
