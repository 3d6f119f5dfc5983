"""The engine's process makes the engine that the settings ask for, and sends its outputs in few messages."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from calumma.model.generation import Request, SamplingParams
from calumma.serve.protocol import Finished, GenerationRequest, TextDelta, TokenCount
from calumma.serve.replica.engine import main
from calumma.serve.replica.engine.client import Admitted, EngineOutput, ImageCodes
from calumma.serve.replica.engine.main import BATCH_SECONDS, STATISTICS_SECONDS, OutputBatcher, load_model
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
    assert sent(TextDelta("c"), urgent) == [TextDelta("b"), TextDelta("c"), urgent]
    assert sent(TextDelta("d")) is None
    assert sent(after=BATCH_SECONDS) == [TextDelta("d")]
    assert sent(after=BATCH_SECONDS) is None, "nothing is nothing to send"
    assert sent(after=STATISTICS_SECONDS) == [], "but for the statistics"
    assert connection.messages[0].statistics == {"steps": now[0]}
    assert sent(TextDelta("e")) is None
    batcher.flush(dict, idle=True)
    assert connection.messages[-1].outputs == [("a", TextDelta("e"))], "no later step is waited for"
