"""The engine's process makes the engine that the settings ask for, and sends its outputs in few messages."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.generation import Request, SamplingParams
from calumma.serve.protocol import Finished, GenerationRequest, ImageProgress, TextDelta, Token, TokenCount
from calumma.serve.replica.engine import main
from calumma.serve.replica.engine.client import Admitted, Answered, EngineOutput, ImageCodes, Texts
from calumma.serve.replica.engine.main import (
    BATCH_SECONDS,
    STATISTICS_SECONDS,
    OutputBatcher,
    load_model,
    merged,
)
from calumma.serve.replica.engine.messages import Outputs, Start
from calumma.serve.replica.engine.thread import EngineThread
from calumma.serve.settings import ModelSettings


def test_a_specification_reaches_the_engine(model_directory: Path) -> None:
    settings = ModelSettings(
        model=str(model_directory), max_sequences=3, cache_tokens=640, speculative=2, cuda_graphs=True
    )
    model, options = load_model(Start(settings, str(model_directory), 1, None))
    thread = EngineThread(model, **options)
    try:
        engine = thread._engine
        assert (engine.max_sequences, engine.statistics.blocks * engine.statistics.block_size) == (3, 640)
        assert engine._runner.window == 2
        assert engine._runner.graphs is not None
    finally:
        thread.close()


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", None])
def test_an_engine_computes_in_the_dtype_asked_for_and_in_a_shorter_context(
    model_directory: Path, dtype: Literal["int8", "bfloat16"] | None
) -> None:
    settings = ModelSettings(model=str(model_directory), max_sequences=2, dtype=dtype, context=64)
    model, options = load_model(Start(settings, str(model_directory), 1, None))
    kinds = {weight.dtype for name, weight in model.transformer.named_parameters() if not name.endswith("scale")}
    half = torch.bfloat16
    assert kinds == {"int8": {torch.int8, half}, "bfloat16": {half}, None: {torch.float32}}[dtype]
    thread = EngineThread(model, **options)
    try:
        now = thread._engine.statistics
        assert (thread._engine.context, now.blocks * now.block_size) == (64, 2 * 64)
        outputs: list[EngineOutput] = []
        ended = threading.Event()

        def on_output(output: EngineOutput) -> None:
            outputs.append(output)
            if isinstance(output, Finished):
                ended.set()

        request = GenerationRequest("a", (1, 5, 9), SamplingParams(), max_tokens=5)
        thread.submit(Request("a", [1, 5, 9], SamplingParams(5, "text")), request, on_output)
        assert ended.wait(60)
        assert isinstance(outputs[-1], Finished)
    finally:
        thread.close()


class Connection:
    def __init__(self) -> None:
        self.messages: list[Outputs] = []

    def send(self, message: Outputs) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("urgent", [Finished("stop", TokenCount()), ImageCodes([1], 1, 0.0), Admitted()])
def test_the_first_text_and_what_is_urgent_are_sent_at_once_and_the_rest_together(
    urgent: EngineOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(main.time, "monotonic", lambda: now[0])
    connection: Any = Connection()
    batcher = OutputBatcher(connection)
    on_output = batcher.callback("a")

    def sent(*outputs: EngineOutput, after: float = 0.001) -> list[EngineOutput] | None:
        """What is sent at the end of a step with these outputs; None: nothing."""
        for one in outputs:
            on_output(one)
        now[0] += after
        connection.messages.clear()
        batcher.flush(lambda: {"steps": now[0]}, idle=False)
        return [one for message in connection.messages for _, one in message.outputs] if connection.messages else None

    assert sent(TextDelta("a")) == [TextDelta("a")]
    assert sent(TextDelta("b")) is None
    assert sent(TextDelta("c"), urgent) == [Texts(TextDelta("bc"), 2), urgent]
    assert sent(TextDelta("d")) is None
    assert sent(after=BATCH_SECONDS) == [TextDelta("d")]
    assert sent(after=BATCH_SECONDS) is None, "nothing is nothing to send"
    assert sent(after=STATISTICS_SECONDS) == [], "but for the statistics"
    assert connection.messages[0].statistics == {"steps": now[0]}
    assert sent(TextDelta("e")) is None
    batcher.flush(dict, idle=True)
    assert connection.messages[-1].outputs == [("a", TextDelta("e"))], "no later step is waited for"


TEXTS = st.builds(
    TextDelta, st.text("ab", max_size=2), st.lists(st.just(Token(7, b"a", 0, None)), max_size=2).map(tuple)
)
OTHERS = st.sampled_from([Admitted(), ImageProgress(1, 2), ImageCodes([1], 1, 0.0), Finished("stop", TokenCount())])
ANSWERS = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple).map(Answered)


@given(st.lists(st.tuples(st.sampled_from("xyz"), TEXTS | TEXTS | ANSWERS | OTHERS), max_size=30))
def test_merged_outputs_say_of_every_request_what_the_single_ones_did(outputs: list[tuple[str, EngineOutput]]) -> None:
    def said(given: list[tuple[str, EngineOutput]], request_id: str) -> list[Any]:
        """Between two outputs of another kind: text, its tokens, how many texts, ids."""
        parts: list[Any] = [("", (), 0, ())]
        for text, tokens, count, ids, other in (_parts(output) for name, output in given if name == request_id):
            last = parts[-1]
            parts[-1] = (last[0] + text, last[1] + tokens, last[2] + count, last[3] + ids)
            parts += [other, ("", (), 0, ())] if other is not None else []
        return parts

    found = merged(outputs)
    assert all(said(found, name) == said(outputs, name) for name in "xyz")
    for name in "xyz":
        kinds = [type(output) for other, output in found if other == name]
        assert not any({a, b} <= {TextDelta, Texts} or a == b == Answered for a, b in pairwise(kinds))


def _parts(output: EngineOutput) -> tuple[str, tuple[Token, ...], int, tuple[int, ...], EngineOutput | None]:
    match output:
        case Texts(delta, count):
            return delta.text, delta.tokens, count, (), None
        case TextDelta(text, tokens):
            return text, tokens, 1, (), None
        case Answered(ids):
            return "", (), 0, ids, None
        case other:
            return "", (), 0, (), other
