"""Answers in a form that was asked for, with a real tokenizer and a model that knows nothing: that is all it has."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from calumma.model import Document, MixedModalModel, Text, generate
from calumma.model.generation import Constraint, Engine, PhaseSampling, Request, SamplingParams
from calumma.model.tokenizers.grammar import GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 99}, "word": {"enum": ["ein", "zwei", "三"]}},
    "required": ["digit", "word"],
    "additionalProperties": False,
}
HOT = PhaseSampling(1.0, 1.0)


def text_of(answer: Document) -> str:
    return "".join(segment.text for segment in answer.segments if isinstance(segment, Text))


def test_answers_have_the_form_that_each_asks_for(model: MixedModalModel) -> None:
    prompt = Document((Text("Which digit is this?", "user"),))
    asked = [
        Constraint("json_schema", json.dumps(SCHEMA)),
        Constraint("choice", '["yes", "no", "三 a"]'),
        Constraint("regex", r"[0-9]{2}-[a-z]+"),
        Constraint("grammar", 'start: "a" start | "b"'),
    ]
    params = [SamplingParams(100, text=HOT, seed=seed, constraint=asked[seed % 4]) for seed in range(12)]
    params.append(SamplingParams(20, text=HOT, seed=5))  # of no form
    answers = [text_of(answer) for answer in generate(model, [prompt] * len(params), params)]
    for number, text in enumerate(answers[:12]):
        if number % 4 == 0:
            jsonschema.validate(json.loads(text), SCHEMA)
        elif number % 4 == 1:
            assert text in ("yes", "no", "三 a")
        elif number % 4 == 2:
            assert re.fullmatch(r"[0-9]{2}-[a-z]*", text)  # perhaps cut off by the context
        else:
            assert re.fullmatch(r"a*b?", text)
    (alone,) = generate(model, [prompt], params[-1])
    assert text_of(alone) == answers[-1]


def test_an_answer_of_a_form_goes_on_from_any_cut(model: MixedModalModel) -> None:
    compiler = GrammarCompiler(model.text_tokenizer, model.vocabulary)
    params = SamplingParams(60, text=HOT, seed=2, constraint=Constraint("json_schema", json.dumps(SCHEMA)))

    def answer(params: SamplingParams, **options: Any) -> list[int]:
        engine = Engine(model.transformer, model.vocabulary, model.image_length, constraints=compiler, **options)
        engine.add(Request("r", [model.vocabulary.bos], params))
        return [token for _ in iter(lambda: engine.has_work, False) for e in engine.step() for token in e.tokens]

    whole = answer(params)
    jsonschema.validate(json.loads(model.text_tokenizer.decode(whole)), SCHEMA)
    for cut in range(len(whole) + 1):
        assert answer(replace(params, prefix=tuple(whole[:cut])), prefill_tokens=3) == whole
    foreign = tuple(model.text_tokenizer.encode("[1"))
    with pytest.raises(ValueError, match="the grammar does not allow id"):
        answer(replace(params, prefix=foreign))


def test_what_is_wrong_with_a_form_is_told_with_the_prompts_number(model: MixedModalModel) -> None:
    params = [SamplingParams(9), SamplingParams(9, constraint=Constraint("regex", "(("))]
    prompt = Document((Text("Which digit is this?", "user"),))
    with pytest.raises(ValueError, match="prompt 2 of 2: the regular expression cannot be followed"):
        generate(model, [prompt] * 2, params)
