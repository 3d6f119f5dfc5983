"""How tools stand in a conversation's text: what may be called, calls, and what they returned.

Each is JSON between two marks, as in Hermes and Qwen:

    <tools>{"name": …, "description": …, "parameters": a JSON schema} …</tools>      at the head of the first turn
    <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>        the end of an assistant's turn
    <tool_response>{"name": "weather", "content": "12 degrees"}</tool_response>      in a user's turn

The JSON is what `json.dumps` makes, its `<` written as `\\u003c`: nothing within it can end it. A mark within any other
text of such a conversation gets a backslash, `<\\tool_call>`: nobody's words can stand for a call or for its result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

BEGIN_CALL, END_CALL = "<tool_call>", "</tool_call>"
# A call is this, its arguments, "}" and END_CALL.
HEAD = re.compile(r'\{"name": "(?P<name>[^"\\]+)", "arguments": ')
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MARK = re.compile(r"<(?=/?(?:tools|tool_call|tool_response)>)")
INSTRUCTIONS = (
    "You may call these tools. To do so, end your answer with one call or several, each like this:\n"
    f'{BEGIN_CALL}{{"name": the tool\'s name, "arguments": an object that follows its parameters}}{END_CALL}'
)


@dataclass(frozen=True)
class Tool:
    """parameters: a JSON schema of an object. strict: every part of the schema must be one that a grammar can keep;
    else parts that none can keep are left out."""

    name: str
    description: str
    parameters: dict[str, Any]
    strict: bool = False


def tools_text(tools: Iterable[Tool]) -> str:
    described = (
        _json({"name": tool.name, "description": tool.description, "parameters": tool.parameters}) for tool in tools
    )
    return "\n".join([INSTRUCTIONS, "<tools>", *described, "</tools>"])


def call_text(name: str, arguments: str) -> str:
    """arguments: as JSON; what is none stands as a text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return f"{BEGIN_CALL}{_json({'name': name, 'arguments': value})}{END_CALL}"


def response_text(name: str, content: str) -> str:
    return f"<tool_response>{_json({'name': name, 'content': content})}</tool_response>"


def without_marks(text: str) -> str:
    """A text in which no mark stands."""
    return MARK.sub(r"<\\", text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


# ---- as a grammar


def head_text(name: str) -> str:
    return f'{{"name": "{name}", "arguments": '


def tools_value(
    tools: Iterable[Tool], calls: Literal["may", "must"], several: bool, text: tuple[str, str] | None = None
) -> str:
    """The value of a `Constraint` of the kind "tools". calls: whether the answer may be text, or must be calls.
    several: more than one of them. text: kind and value of the constraint that the text follows; None: any text."""
    listed = [{"name": tool.name, "parameters": tool.parameters, "strict": tool.strict} for tool in tools]
    return json.dumps({"tools": listed, "calls": calls, "several": several, "text": text})
