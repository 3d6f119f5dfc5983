"""Grammars over ids: what a mask lets through is what the grammar describes, and all of it, by the word of others
(json, jsonschema, re)."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calumma.model.generation import Constraint
from calumma.model.tokenizers.grammar import KEPT, LONGEST, LONGEST_GRAMMAR, GrammarCompiler, TokenGrammar
from calumma.model.tokenizers.text import HuggingFaceTokenizer, TextTokenizer
from calumma.model.vocabulary import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "digits": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "kind": {"enum": ["zero", "eins", "数", None, 1.5]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not yet", " led by a space", "日本 a/b\n", "", 'the "third"', "\\d"]
SUMS = 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]{1,3}/'
GBNF = 'root ::= "(" root ")" | "x"'


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level", "byte_fallback", "prefixed"])
def spoken(
    request: pytest.FixtureRequest, model_directory: Path, byte_level: dict[str, Any], byte_fallback: dict[str, Any]
) -> tuple[TextTokenizer, Vocabulary]:
    if request.param == "sentencepiece":
        return TextTokenizer.read(model_directory), Vocabulary.read(model_directory)
    prefixed = {**byte_level, "pre_tokenizer": {**byte_level["pre_tokenizer"], "add_prefix_space": True}}
    document = {"byte_level": byte_level, "byte_fallback": byte_fallback, "prefixed": prefixed}[request.param]
    ids = document["model"]["vocab"]
    vocabulary = Vocabulary(
        size=400,
        **{
            name: ids[token]
            for name, token in (("bos", "<s>"), ("pad", "<pad>"), ("eos", "</s>"), ("unknown", "<unk>"))
        },
        begin_image=ids["<racm3:break>"],
        end_image=ids["<eoss>"],
        end_turn=ids["<reserved08706>"],
        image_codes=[token for name, token in ids.items() if name.startswith("IMGIMG")],
        reserved=[token for name, token in ids.items() if name.startswith("<reserved") and "8706" not in name],
    )
    return HuggingFaceTokenizer(json.dumps(document), vocabulary), vocabulary


@pytest.fixture(scope="module")
def compiler(spoken: tuple[TextTokenizer, Vocabulary]) -> GrammarCompiler:
    return GrammarCompiler(*spoken)


def allowed(grammar: TokenGrammar, size: int) -> list[int]:
    mask_W = np.full(-(-size // 32), -1, dtype=np.int32)
    grammar.fill_mask(mask_W)
    return np.nonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))[0].tolist()


def spelled(
    compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary], constraint: Constraint, seed: int
) -> str:
    """A text at random, each id from those that may come; one that grows long closes what is open."""
    tokenizer, vocabulary = spoken
    grammar, choose, ids = compiler(constraint), random.Random(seed), []
    possible = {*vocabulary.text_ids, vocabulary.eos, vocabulary.end_turn}
    for _ in range(2000):
        may = allowed(grammar, vocabulary.size)
        assert may
        assert possible.issuperset(may)
        assert (vocabulary.eos in may) == (vocabulary.end_turn in may)
        if vocabulary.eos in may and (len(may) == 2 or choose.random() < 0.3):
            return tokenizer.decode(ids)
        may = [token for token in may if token not in (vocabulary.eos, vocabulary.end_turn)]
        closing = [token for token in may if tokenizer.decode([token]) in set('",}]')] if len(ids) > 200 else []
        ids.append(choose.choice(closing or may))
        grammar.advance(ids[-1])
    raise AssertionError("it does not end")


seeds = st.integers(0, 10_000)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_what_comes_follows_the_schema(
    compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary], seed: int
) -> None:
    text = spelled(compiler, spoken, Constraint("json_schema", json.dumps(SCHEMA)), seed)
    jsonschema.validate(json.loads(text), SCHEMA)


@settings(max_examples=10, deadline=None)
@given(seed=seeds)
@example(seed=159)  # a long number
def test_what_comes_is_json(compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary], seed: int) -> None:
    nested = {"type": "object", "additionalProperties": {"type": ["boolean", "null", "number"]}, "maxProperties": 3}
    assert isinstance(json.loads(spelled(compiler, spoken, Constraint("json_schema", json.dumps(nested)), seed)), dict)


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_what_comes_matches(compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary], seed: int) -> None:
    expression = r"[a-c]{1,4}(-|/|é)\d{2}( x)?"
    assert re.fullmatch(expression, spelled(compiler, spoken, Constraint("regex", expression), seed))
    assert re.fullmatch(expression, spelled(compiler, spoken, Constraint("regex", f"^{expression}$"), seed))
    assert spelled(compiler, spoken, Constraint("choice", json.dumps(CHOICES)), seed) in CHOICES
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3})*", spelled(compiler, spoken, Constraint("grammar", SUMS), seed))
    assert re.fullmatch(r"\(*x\)*", spelled(compiler, spoken, Constraint("grammar", GBNF), seed))


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        (Constraint("choice", json.dumps(CHOICES)), CHOICES),
        (Constraint("json"), ["{}", '{"a": [1, {"b": null}], "c": "d\\n"}', '{\n  "a": "é数 \\" \\\\"\n}']),
        (
            Constraint("json_schema", json.dumps(SCHEMA)),
            ['{"name": "x", "kind": "数"}', '{"name":"","digits":[1,9],"kind":null}'],
        ),
        (Constraint("regex", r"(.|\n)*"), ["", " a", "a  b\n", "日本 a/b", "\t"]),
        (Constraint("grammar", SUMS), ["1", "12+345+6"]),
        (Constraint("grammar", GBNF), ["x", "((x))"]),
    ],
)
def test_every_text_of_a_grammar_may_come(
    compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary], constraint: Constraint, texts: list[str]
) -> None:
    """As the tokenizer cuts it, where its ids have the text's bytes."""
    tokenizer, vocabulary = spoken
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) != text:
            continue
        grammar = compiler(constraint)
        if not ids and tokenizer.leading_space:
            continue  # an empty text has no space before it
        for token in ids:
            assert token in allowed(grammar, vocabulary.size), text
            grammar.advance(token)
        assert vocabulary.eos in allowed(grammar, vocabulary.size), text


def test_what_may_not_come_is_refused_and_copies_go_their_own_ways(
    compiler: GrammarCompiler, spoken: tuple[TextTokenizer, Vocabulary]
) -> None:
    tokenizer, vocabulary = spoken
    grammar = compiler(Constraint("choice", '["yes", "no"]'))
    (*first, last) = tokenizer.encode("yes")
    for token in first:
        grammar.advance(token)
    other = grammar.copy()
    grammar.advance(last)
    assert allowed(grammar, vocabulary.size) == sorted([vocabulary.eos, vocabulary.end_turn])
    assert last in allowed(other, vocabulary.size)
    with pytest.raises(ValueError, match="does not allow id"):
        other.advance(tokenizer.encode_further("?")[0])


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("regex", "(("), "the regular expression cannot be followed: .*invalid regex"),
        (Constraint("regex", r"(a)\1"), "the regular expression cannot be followed"),
        (Constraint("regex", ""), "the regular expression is empty"),
        (Constraint("json_schema", "{"), "the JSON schema is no JSON"),
        (Constraint("json_schema", "3"), "the JSON schema is '3', and no object"),
        (Constraint("json_schema", '{"type": "nope"}'), "the JSON schema cannot be followed: .*nope"),
        (Constraint("json_schema", '{"not": {}}'), r"the JSON schema cannot be followed: .*\"not\""),
        (Constraint("json_schema", '{"$ref": "https://example.com/a.json"}'), "the JSON schema cannot be followed"),
        (Constraint("json_schema", '{"$ref": "#"}'), "the JSON schema cannot be followed"),
        (Constraint("json_schema", "[" * 60_000 + "]" * 60_000), "the JSON schema is nested too deeply"),
        (Constraint("json_schema", '"' + "a" * LONGEST + '"'), "may be followed at most"),
        (Constraint("choice", "[]"), "no list of texts"),
        (Constraint("choice", "[1]"), "no list of texts"),
        (Constraint("grammar", " "), "the grammar is empty"),
        (Constraint("grammar", "start: x"), "the grammar cannot be followed: .*unknown name"),
        (Constraint("grammar", "hello world"), "the grammar is neither Lark's nor GBNF"),
        (Constraint("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000), "the grammar is nested too deeply"),
        (Constraint("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000), "the grammar cannot be followed"),
        (Constraint("grammar", "#" * (LONGEST_GRAMMAR + 1)), "may be followed at most"),
    ],
)
def test_what_is_no_grammar_is_told(compiler: GrammarCompiler, constraint: Constraint, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiler(constraint)


def test_a_grammar_that_blows_up_ends_with_an_error(compiler: GrammarCompiler, spoken: Any) -> None:
    _, vocabulary = spoken

    def follow() -> None:
        grammar = compiler(Constraint("regex", "(a{1000}){1000}"))
        for _ in range(3):
            grammar.advance(allowed(grammar, vocabulary.size)[0])

    with pytest.raises(ValueError, match="the grammar is too large to be followed"):
        follow()


def test_the_last_used_grammars_are_kept(compiler: GrammarCompiler) -> None:
    for number in range(KEPT + 10):
        compiler(Constraint("regex", f"a{{{number + 1}}}"))
        compiler(Constraint("json"))
    assert len(compiler._compiled) == KEPT
    assert Constraint("json") in compiler._compiled
