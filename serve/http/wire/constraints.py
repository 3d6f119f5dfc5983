"""Grammars that a request puts on the answer's text, in the spellings of OpenAI (`response_format`) and of vLLM
(`structured_outputs`, and the older `guided_json` and its kin)."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import ConfigDict, Field

from calumma.model.generation.constraint import Constraint
from calumma.serve.http.wire.content import RequestModel
from calumma.serve.http.wire.errors import APIError

Schema = dict[str, Any] | bool


class NamedSchema(RequestModel):
    """`strict` makes no difference: the schema is always kept to."""

    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(True, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's `response_format`. `schema`: where llama.cpp's and Together's clients send it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")

    @property
    def schema_and_param(self) -> tuple[Schema, str] | None:
        if self.json_schema is not None:
            return self.json_schema.schema_, "json_schema.schema"
        return None if self.schema_ is None else (self.schema_, "schema")


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`; one of its fields."""

    model_config = ConfigDict(extra="forbid")

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class ConstraintFields(RequestModel):
    """The fields of a request that ask for a grammar; at most one of them may."""

    response_format: ResponseFormat | None = Field(None, description="JSON, or JSON of a schema")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="vLLM's form: one of `json`, `regex`, `choice`, `grammar`, `json_object`"
    )
    guided_json: Schema | str | None = Field(None, description="a JSON schema that the text keeps")
    guided_regex: str | None = Field(None, description="a regular expression that the whole text matches")
    guided_choice: list[str] | None = Field(None, min_length=1, description="texts, one of which is the answer")
    guided_grammar: str | None = Field(None, description="a context-free grammar, as Lark or GBNF write it")

    @property
    def constraint(self) -> Constraint | None:
        """Raises APIError on more than one grammar, and on a form that this server does not know."""
        found = [(name, one) for name, one in self._constraints() if one is not None]
        if len(found) > 1:
            names = " and ".join(f"`{name}`" for name, _ in found)
            raise APIError(f"{names} ask for a grammar each; one answer has one", param=found[1][0])
        return found[0][1] if found else None

    @property
    def grammar_field(self) -> str | None:
        """Which field the grammar is in."""
        return next((name for name, one in self._constraints() if one is not None), None)

    def _constraints(self) -> list[tuple[str, Constraint | None]]:
        asked = self.structured_outputs or StructuredOutputs()
        if asked.structural_tag is not None:
            raise APIError(
                "this server has no `structural_tag`; leave it out",
                param="structured_outputs.structural_tag",
                code="unsupported",
            )
        within = "structured_outputs"
        return [
            ("response_format", _of_format(self.response_format)),
            ("guided_json", _json(self.guided_json, "guided_json")),
            ("guided_regex", _text("regex", self.guided_regex)),
            ("guided_choice", _choice(self.guided_choice)),
            ("guided_grammar", _text("grammar", self.guided_grammar)),
            (f"{within}.json", _json(asked.json_, f"{within}.json")),
            (f"{within}.regex", _text("regex", asked.regex)),
            (f"{within}.choice", _choice(asked.choice)),
            (f"{within}.grammar", _text("grammar", asked.grammar)),
            (f"{within}.json_object", Constraint("json") if asked.json_object else None),
        ]


def _of_format(asked: ResponseFormat | None) -> Constraint | None:
    if asked is None or asked.type == "text":
        return None
    if asked.schema_and_param is not None:
        schema, param = asked.schema_and_param
        return _json(schema, f"response_format.{param}")
    if asked.type == "json_object":
        return Constraint("json")
    raise APIError("type json_schema needs the schema", param="response_format.json_schema", code="invalid_value")


def _json(schema: Schema | str | None, param: str) -> Constraint | None:
    """Of a schema, or of its text."""
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise APIError(f"the schema is no JSON: {error}", param=param, code="invalid_value") from error
    return Constraint("json_schema", json.dumps(schema))


def _text(kind: Literal["regex", "grammar"], value: str | None) -> Constraint | None:
    return None if value is None else Constraint(kind, value)


def _choice(values: list[str] | None) -> Constraint | None:
    return None if values is None else Constraint("choice", json.dumps(values))
