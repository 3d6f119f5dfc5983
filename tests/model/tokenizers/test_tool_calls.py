"""Calls of tools as text: what a grammar lets through are calls whose arguments follow the schema, and nobody's words
can stand for them."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.generation import Constraint
from calumma.model.tokenizers.grammar import GrammarCompiler
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.tool_calls import (
    BEGIN_CALL,
    END_CALL,
    Tool,
    call_text,
    response_text,
    tools_text,
    tools_value,
    without_marks,
)
from calumma.model.vocabulary import Vocabulary

from .test_grammar import allowed, compiler, spelled, spoken  # noqa: F401

DIGIT = Tool(
    "draw-digit",
    "Draws a digit.",
    {"type": "object", "properties": {"digit": {"enum": [0, 7, "<tool_call>"]}}, "required": ["digit"],
     "additionalProperties": False},
)  # fmt: skip
NOW = Tool("now", "", {"type": "object", "properties": {}, "additionalProperties": False})
CALL = re.compile(f"{BEGIN_CALL}(.*?){END_CALL}")
Spoken = tuple[TextTokenizer, Vocabulary]


def constraint(calls: Any, several: bool = True, text: tuple[str, str] | None = None) -> Constraint:
    return Constraint("tools", tools_value([DIGIT, NOW], calls, several, text))


def called(text: str) -> list[Any]:
    """The calls that a text is made of, which follow the schemas."""
    calls = [json.loads(found) for found in CALL.findall(text)]
    assert "".join(call_text(call["name"], json.dumps(call["arguments"])) for call in calls).replace(
        "\\u003c", "<"
    ) == text.replace("\\u003c", "<")
    for call in calls:
        jsonschema.validate(call["arguments"], {"draw-digit": DIGIT, "now": NOW}[call["name"]].parameters)
    return calls


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_calls_that_must_come_do(compiler: GrammarCompiler, spoken: Spoken, seed: int) -> None:  # noqa: F811
    assert called(spelled(compiler, spoken, constraint("must"), seed))
    assert len(called(spelled(compiler, spoken, constraint("must", several=False), seed))) == 1
    either = spelled(compiler, spoken, constraint("may", text=("choice", '["yes", "no"]')), seed)
    assert either in ("yes", "no") or called(either)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_text_may_come_and_once_it_calls_it_does_so_properly(
    compiler: GrammarCompiler,  # noqa: F811
    spoken: Spoken,  # noqa: F811
    seed: int,
) -> None:
    tokenizer, vocabulary = spoken
    grammar, choose = compiler(constraint("may")), random.Random(seed)
    ends = {vocabulary.eos, vocabulary.end_turn}
    ids: list[int] = []
    for token in tokenizer.encode("I draw <tool_ it.<tool_call"):
        assert {token, *ends} <= set(allowed(grammar, vocabulary.size))
        ids.append(token)
        grammar.advance(token)
    assert not grammar.may_begin_image, "it would cut the mark in two"
    while True:
        may = allowed(grammar, vocabulary.size)
        text = tokenizer.decode(ids)
        if BEGIN_CALL not in text:  # any text: here, to the mark's end
            may = [token for token in may if tokenizer.surface(token).startswith(b">")]
        elif ends & set(may) and (ends.issuperset(may) or choose.random() < 0.5):
            break
        else:
            assert not grammar.may_begin_image
        ids.append(choose.choice([token for token in may if token not in ends]))
        grammar.advance(ids[-1])
    before, mark, rest = text.partition(BEGIN_CALL)
    assert before.endswith("I draw <tool_ it.")
    assert called(mark + rest)


def test_images_may_come_in_the_text_before_calls(compiler: GrammarCompiler, spoken: Spoken) -> None:  # noqa: F811
    tokenizer, _ = spoken
    grammar = compiler(constraint("may"))
    assert grammar.may_begin_image
    for token in tokenizer.encode("a < b"):
        grammar.advance(token)
    assert grammar.may_begin_image
    for token in tokenizer.encode_further(BEGIN_CALL):
        grammar.advance(token)
        assert not grammar.may_begin_image
    assert not grammar.copy().may_begin_image
    assert not compiler(constraint("must")).may_begin_image
    assert not compiler(constraint("may", text=("json", ""))).may_begin_image


def test_a_schema_that_no_grammar_keeps_is_refused_where_it_is_strict(compiler: GrammarCompiler) -> None:  # noqa: F811
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    lenient, strict = (
        Constraint("tools", tools_value([Tool("f", "", parameters, strict)], "must", False)) for strict in (False, True)
    )
    compiler(lenient)
    with pytest.raises(ValueError, match="the tools cannot be followed"):
        compiler(strict)


@given(text=st.text() | st.sampled_from([BEGIN_CALL, "</tools>", f"{END_CALL}{BEGIN_CALL}", "<<tool_call>>"]))
def test_nobodys_words_stand_for_calls(text: str) -> None:
    said = without_marks(text)
    arguments, parameters = json.dumps({"a": text}), {"description": text}
    for told in (said, call_text("f", arguments)[len(BEGIN_CALL) : -len(END_CALL)], response_text("f", text)):
        assert not CALL.search(told)
        assert BEGIN_CALL not in told
        assert "</tools>" not in told
        assert told.count("</tool_response>") <= 1
    assert json.loads(call_text("f", arguments)[len(BEGIN_CALL) : -len(END_CALL)])["arguments"] == {"a": text}
    lines = tools_text([Tool("f", text, parameters)]).partition("<tools>\n")[2].removesuffix("\n</tools>")
    assert json.loads(lines) == {"name": "f", "description": text, "parameters": parameters}


def test_arguments_that_are_no_json_are_told_as_text() -> None:
    assert call_text("f", '{"a": ') == '<tool_call>{"name": "f", "arguments": "{\\"a\\": "}</tool_call>'
    assert np.all(call_text("f", "[" * 100_000))
