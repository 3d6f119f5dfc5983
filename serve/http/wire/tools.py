"""Tools in requests and calls in answers, in OpenAI's forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from calumma.model.generation.constraint import Constraint
from calumma.model.tokenizers.tool_calls import NAME, Tool, tools_value
from calumma.serve.http.wire.content import RequestModel, WireModel
from calumma.serve.http.wire.errors import APIError

MOST_TOOLS = 128
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(RequestModel):
    """`strict`: every part of the schema is kept, or the request is refused; else parts that no grammar can keep are
    left out."""

    name: str = Field(description="letters, digits, `_`, `-` and `.`, at most 64")
    description: str = Field("", description="when to call it, and what for")
    parameters: dict[str, Any] | None = Field(
        None, description="a JSON schema that the arguments follow; none: no arguments"
    )
    strict: bool = Field(False, description="refuse a schema that cannot be kept as a whole")

    @property
    def tool(self) -> Tool:
        return Tool(
            self.name, self.description, NO_PARAMETERS if self.parameters is None else self.parameters, self.strict
        )


class ChatTool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(RequestModel):
    name: str


class NamedTool(RequestModel):
    type: Literal["function"]
    function: FunctionName


ToolMode = Literal["none", "auto", "required"]


class CalledFunction(RequestModel):
    name: str
    arguments: str = "{}"


class SentCall(RequestModel):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def require_tools(tools: Sequence[FunctionDefinition], where: str) -> None:
    """where: the field's name, with {} for the number of the tool. Raises APIError."""
    if len(tools) > MOST_TOOLS:
        raise APIError(
            f"a request may have {MOST_TOOLS} tools, found {len(tools)}", param="tools", code="invalid_value"
        )
    names: set[str] = set()
    for number, tool in enumerate(tools):
        param = where.format(number)
        if not NAME.fullmatch(tool.name):
            raise APIError(
                f"a tool's name has at most 64 letters, digits, `_`, `-` and `.`; given {tool.name[:100]!r}",
                param=f"{param}.name",
                code="invalid_value",
            )
        if tool.name in names:
            raise APIError(f"two tools have the name {tool.name!r}", param=f"{param}.name", code="invalid_value")
        names.add(tool.name)


def tools_constraint(
    tools: Sequence[FunctionDefinition], choice: ToolMode | str, several: bool, text: Constraint | None
) -> Constraint:
    """choice: "auto", "required", or "=NAME". text: what the answer's text follows where it calls nothing. Raises
    APIError."""
    name = choice.removeprefix("=") if choice.startswith("=") else None
    offered = [tool.tool for tool in tools if name is None or tool.name == name]
    if not offered:
        raise APIError(f"there is no tool with the name {name!r} among the tools", param="tool_choice")
    calls: Literal["may", "must"] = "may" if choice == "auto" else "must"
    follows = (text.kind, text.value) if text is not None and calls == "may" else None
    try:
        return Constraint("tools", tools_value(offered, calls, several and name is None, follows))
    except (ValueError, RecursionError) as error:
        raise APIError(f"the tools cannot be written as JSON: {error}", param="tools", code="invalid_value") from error


# ---- answers


class Function(WireModel):
    name: str
    arguments: str


class ToolCall(WireModel):
    id: str
    type: Literal["function"] = "function"
    function: Function


class FunctionDelta(WireModel):
    name: str | None = None
    arguments: str = ""


class ToolCallChunk(WireModel):
    """index: its number among the answer's calls. The first of a call has its id and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
