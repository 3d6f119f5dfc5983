"""What one request's output becomes of the engine's events."""

from __future__ import annotations

import pytest

from calumma.model import MixedModalModel
from calumma.model.document import Document
from calumma.model.generation import Event, Logprob, SamplingParams
from calumma.serve.protocol import Finished, GenerationRequest, TextDelta, Token, TokenCount
from calumma.serve.replica.engine.client import EngineOutput
from calumma.serve.replica.engine.detokenizer import Detokenizer


def outputs(
    model: MixedModalModel, event: Event, logprobs: int | None = 2, stop: tuple[str, ...] = ()
) -> list[EngineOutput]:
    request = GenerationRequest("a", Document(()), SamplingParams(), logprobs=logprobs, stop=stop)
    return Detokenizer(model, request, lambda output: None).process(event)


@pytest.mark.parametrize("name", ["eos", "end_turn"])
def test_the_stop_id_that_came_ends_the_logprobs_with_its_own_value(model: MixedModalModel, name: str) -> None:
    stop = getattr(model.vocabulary, name)
    other = model.text_tokenizer.encode("s")[0]
    score = Logprob(-1.25, ((other, -0.5), (stop, -1.25)))
    event = Event("a", [], "text", "stop", stop_id=stop, stop_logprob=score)
    token = Token(stop, b"", 0, -1.25, ((other, model.text_tokenizer.surface(other), -0.5), (stop, b"", -1.25)))
    assert outputs(model, event) == [TextDelta("", (token,)), Finished("stop", TokenCount())]
    assert outputs(model, event, logprobs=None) == [Finished("stop", TokenCount())]


def test_an_answer_that_no_id_ended_has_no_stop_token(model: MixedModalModel) -> None:
    assert outputs(model, Event("a", [], "text", "length")) == [Finished("length", TokenCount())]
    assert outputs(model, Event("a", [], "image", "stop")) == [Finished("stop", TokenCount())]
