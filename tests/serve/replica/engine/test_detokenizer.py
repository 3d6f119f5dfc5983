"""The engine's tokens of one request become text and codes of images, counted, and end at a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from calumma.model import MixedModalModel
from calumma.model.document import Document
from calumma.model.generation import Event, SamplingParams
from calumma.model.generation.request import Logprob
from calumma.serve.protocol import Finished, GenerationRequest, ImageProgress, TextDelta, TokenCount
from calumma.serve.replica.engine.client import Answered, EngineOutput, ImageCodes, PromptLogprobs
from calumma.serve.replica.engine.detokenizer import PROGRESS_STEPS, Detokenizer

Make = Callable[..., Detokenizer]


class Shown(Detokenizer):
    """What clients get of it; the ids that another replica could go on from are test_continuation's."""

    def process(self, event: Event) -> list[EngineOutput]:
        return [output for output in super().process(event) if not isinstance(output, Answered)]


@pytest.fixture
def detokenizer(model: MixedModalModel) -> Make:
    def make(**fields: Any) -> Detokenizer:
        params = fields.pop("params", SamplingParams())
        return Shown(model, GenerationRequest("a", Document(()), params, **fields), lambda output: None)

    return make


def event(tokens: list[int], **fields: Any) -> Event:
    return Event("a", tokens, "text", **fields)


def text_of(outputs: list[EngineOutput]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, TextDelta))


@pytest.fixture
def image(model: MixedModalModel) -> list[int]:
    """Token ids of an image of codes 0, 1, 2 …"""
    vocabulary = model.vocabulary
    token_of = {code: token for token, code in vocabulary.code_of.items()}
    codes = [token_of[code] for code in range(model.image_length)]
    return [vocabulary.begin_image, *codes, vocabulary.end_image]


def test_text_and_images_are_counted_and_keep_their_order(
    detokenizer: Make, model: MixedModalModel, image: list[int]
) -> None:
    one, two = model.text_tokenizer.encode("seven"), model.text_tokenizer.encode("a three")
    request = detokenizer()
    outputs = request.process(event([*one, *image]))
    outputs += request.process(event(two, finish="stop"))
    assert [type(output) for output in outputs if not isinstance(output, TextDelta)] == [ImageCodes, Finished]
    at = next(k for k, output in enumerate(outputs) if isinstance(output, ImageCodes))
    assert (text_of(outputs[:at]), text_of(outputs[at:])) == ("seven", "a three")
    codes = outputs[at]
    assert isinstance(codes, ImageCodes)
    assert (codes.codes, codes.total) == (list(range(16)), 16)
    assert outputs[-1] == Finished("stop", TokenCount(len(one) + len(two), 18))


@pytest.mark.parametrize(("least", "shown"), [(0, "Whi"), (4, "Which digit is"), (40, "Which digit is this?")])
def test_no_stop_string_ends_an_answer_before_its_least_tokens(
    detokenizer: Make, model: MixedModalModel, least: int, shown: str
) -> None:
    ids = model.text_tokenizer.encode("Which digit is this?")
    early = next(n for n in range(1, len(ids) + 1) if model.text_tokenizer.decode(ids[:n]).startswith("Which"))
    request = detokenizer(stop=("ch", " this"), params=SamplingParams(min_tokens=min(least, 1) and max(least, early)))
    assert text_of([output for token in ids for output in request.process(event([token]))]) == shown


def test_previews_and_reports_are_spread_over_an_image(detokenizer: Make, image: list[int]) -> None:
    outputs = detokenizer(progress=True, previews=3).process(event(image))
    previews = [len(output.codes) for output in outputs if isinstance(output, ImageCodes)]
    assert previews == [4, 8, 12, 16], "three quarters, and the whole"
    done = [(output.done, output.total) for output in outputs if isinstance(output, ImageProgress)]
    assert done == [(step * 16 // PROGRESS_STEPS, 16) for step in range(PROGRESS_STEPS + 1)]
    silent = detokenizer().process(event(image))
    assert [type(output) for output in silent] == [ImageCodes]


def test_an_image_that_is_cut_is_not_decoded(detokenizer: Make, image: list[int]) -> None:
    outputs = detokenizer().process(event(image[:9], finish="length"))
    assert outputs == [Finished("length", TokenCount(0, 9))]


def test_a_stop_string_ends_the_text_though_more_has_come(detokenizer: Make, model: MixedModalModel) -> None:
    tokens = model.text_tokenizer.encode("Count from two to four")
    outputs = detokenizer(stop=(" two",)).process(event(tokens))
    assert text_of(outputs) == "Count from"
    last = outputs[-1]
    assert isinstance(last, Finished)
    assert (last.reason, 0 < last.completion.text < len(tokens)) == ("stop", True)


@pytest.mark.parametrize(("finish", "reason"), [("stop", "stop"), ("length", "length")])
def test_what_may_have_become_a_stop_string_is_text_in_the_end(
    detokenizer: Make, model: MixedModalModel, finish: Any, reason: str
) -> None:
    request = detokenizer(stop=("two three",))
    tokens = model.text_tokenizer.encode("from two")
    assert text_of(request.process(event(tokens))) == "from "
    outputs = request.process(event([], finish=finish))
    assert outputs == [TextDelta("two"), Finished(reason, TokenCount(len(tokens)))]  # type: ignore[arg-type]


def test_text_before_an_image_is_let_out_before_it(detokenizer: Make, model: MixedModalModel, image: list[int]) -> None:
    request = detokenizer(stop=("two three",))
    request.process(event(model.text_tokenizer.encode("two")))
    outputs = request.process(event(image))
    assert [type(output) for output in outputs] == [TextDelta, ImageCodes]
    assert text_of(outputs) == "two"


def test_log_probabilities_come_with_their_tokens_and_the_end_has_one(
    detokenizer: Make, model: MixedModalModel
) -> None:
    [token, *_] = model.text_tokenizer.encode("seven")
    request = detokenizer(logprobs=1)
    scores = [Logprob(-3.0)]
    outputs = request.process(event([token], logprobs=[-1.0], top_logprobs=[((token, -1.0),)], prompt_logprobs=scores))
    assert outputs[0] == PromptLogprobs(scores)
    stop = model.vocabulary.end_turn
    outputs += request.process(event([], finish="stop", stop_id=stop, stop_logprob=Logprob(-0.5, ((token, -0.25),))))
    tokens = [token for output in outputs if isinstance(output, TextDelta) for token in output.tokens]
    surface = model.text_tokenizer.surface(token)
    assert [(one.id, one.logprob, one.top) for one in tokens] == [
        (token, -1.0, ((token, surface, -1.0),)),
        (stop, -0.5, ((token, surface, -0.25),)),
    ]


def test_an_answer_that_no_id_ended_has_no_stop_token(detokenizer: Make) -> None:
    assert detokenizer(logprobs=1).process(event([], finish="length")) == [Finished("length", TokenCount())]
    assert detokenizer(logprobs=1).process(Event("a", [], "image", "stop")) == [Finished("stop", TokenCount())]
