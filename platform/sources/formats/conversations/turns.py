"""Who says what in a conversation: roles, the system's words, tools, and which answers are trained.

Calls and results of tools stand in the text as they do where models are served (`model/tokenizers/tool_calls.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from calumma.model.document import Image, Role, Text
from calumma.model.tokenizers.tool_calls import Tool, call_text, response_text, tools_text, without_marks
from calumma.platform.sources.files import DraftSegment, Malformed, Reference, field_names, json_type
from calumma.platform.sources.formats.conversations.exchanges import FIELDS, LISTS
from calumma.platform.sources.formats.conversations.marks import has_none
from calumma.platform.sources.notes import Notes

SPEAKERS: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
}
SYSTEM = ("system", "developer")  # whose words open the user's next turn
CALLS = ("function_call", "tool_call", "function-call")
RESULTS = ("tool", "observation", "function", "tool_response", "function_response", "ipython")
SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
IMAGE_FIELDS = (
    "images", "image", "image_path", "image_paths", "images_path", "img", "img_path", "image_file", "image_url",
    "image_urls", "image_base64", "image_list",
)  # fmt: skip
OTHER_MEDIA = ("video", "videos", "audio", "audios")
WEIGHTS = (  # OpenAI's, axolotl's, ms-swift's, and other names of the same
    "weight", "train", "training", "loss", "trainable", "loss_weight", "loss_scale", "loss_mask",
)  # fmt: skip
TRUTHS = {"": None, "0": 0, "1": 1, "false": 0, "true": 1}  # as CSV has weights
PARTLY = ("train_detail", "mask", "masked")  # what is not read, and says that not all is trained
WORDS = ("value", "content", "text")
PLAIN = (("from", "value"), ("role", "content"))  # the fields of most turns
OF_SYSTEM = frozenset(SYSTEM_FIELDS)
OF_TOOLS = frozenset({*CALLS, *RESULTS})
WITH_WEIGHT, UNREADABLE = frozenset(WEIGHTS), frozenset({*OTHER_MEDIA, *PARTLY})
# What a record may have beside its list of turns that bears on how they are read.
BESIDE_PLAIN = frozenset(
    {*FIELDS, *SYSTEM_FIELDS, *IMAGE_FIELDS, *OTHER_MEDIA, *WEIGHTS, "tools", "captions", "kto_tag"}
) - frozenset(LISTS)
TURN_FIELDS = frozenset(
    {
        "from",
        "role",
        "value",
        "text",
        "content",
        "name",
        "tool_calls",
        "function_call",
        "tool_call_id",
        *WEIGHTS,
        *IMAGE_FIELDS,
    }
)


@dataclass(slots=True)
class Said:
    """What one turn says. `images`: the turn's own, or None. `system`: it belongs to no exchange."""

    role: Role
    words: str | list[Any]
    images: Mapping[str, Any] | None = None
    trained: bool = True
    system: bool = False


def plain_segments(row: Mapping[str, Any]) -> list[DraftSegment] | None:
    """The segments of a record of nothing but the words of users and assistants in turn, without a mark: most are so,
    and need none of what all others are looked at for. None where it may have more."""
    if not BESIDE_PLAIN.isdisjoint(row):
        return None
    given = [row[field] for field in LISTS if field in row]
    if len(given) != 1 or type(given[0]) is not list or len(given[0]) < 2:
        return None
    segments: list[DraftSegment] = []
    before: Role | None = None
    for turn in given[0]:
        if type(turn) is not dict or len(turn) != 2:
            return None
        by, field = PLAIN[0] if "from" in turn else PLAIN[1]
        speaker, words = turn.get(by), turn.get(field)
        if type(speaker) is not str or type(words) is not str or words.isspace() or not words or not has_none(words):
            return None
        role = SPEAKERS.get(speaker)
        if role is None or role == before:
            return None
        segments.append(Text(words, role))
        before = role
    return segments


def read_turns(turns: Sequence[Any], row: Mapping[str, Any], notes: Notes) -> list[Said]:
    """The turns of a record as their kind of data writes them. Raises Malformed."""
    tools = _tools(row["tools"]) if row.get("tools") else ""
    said = [] if tools else [plain for turn in turns if (plain := _plain_turn(turn)) is not None]
    if len(said) < len(turns):
        reader = _Turns(bool(tools) or any(_has_tools(turn) for turn in turns))
        said = [reader.read(turn) for turn in turns]
    prompts: list[str] = []
    for field in () if OF_SYSTEM.isdisjoint(row) else SYSTEM_FIELDS:
        if not isinstance(row.get(field) or "", str):
            raise Malformed(f"`{field}` is {json_type(row[field])}, not a text")
        prompts += [row[field]] if row.get(field) and row[field].strip() else []
    system = [s.words for s in said if s.system] if prompts else []
    if not WITH_WEIGHT.isdisjoint(row) and not _trained({f: _truth(row.get(f)) for f in WEIGHTS}, "a record"):
        said = [replace(one, trained=False) for one in said]
    before = [Said("user", tools, system=True)] if tools else []
    before += [Said("user", prompt, system=True) for prompt in dict.fromkeys(prompts) if prompt not in system]
    for turn in turns if any(len(turn) > 2 for turn in turns) else ():
        for name, value in turn.items():
            if name not in TURN_FIELDS and value is not None and value != []:
                notes.skip("turn fields", name)
    return before + said


class _Turns:
    def __init__(self, tools: bool) -> None:
        self._tools = tools
        self._names: dict[str, str] = {}  # of the functions that calls were of, by their ids
        self._called: list[str] = []  # of those whose results are to come

    def read(self, turn: Any) -> Said:
        if not isinstance(turn, Mapping):
            raise Malformed('a turn must be {"from": …, "value": text} or {"role": …, "content": text or parts}')
        speaker = turn.get("from") if isinstance(turn.get("from"), str) else turn.get("role")
        given = [turn[field] for field in WORDS if turn.get(field) is not None]
        words = given[0] if given else "" if any(field in turn for field in WORDS) else None
        if not isinstance(speaker, str) or not isinstance(words, str | list):
            raise Malformed(
                'a turn must be {"from": …, "value": text} or {"role": …, "content": text or parts}; it has '
                f"{field_names(turn)}"
            )
        if any(other != words for other in given):
            raise Malformed(f"a turn has different words in {' and '.join(f'`{n}`' for n in WORDS if turn.get(n))}")
        if not UNREADABLE.isdisjoint(turn) and (media := [f for f in (*OTHER_MEDIA, *PARTLY) if turn.get(f)]):
            raise Malformed(f"a turn has `{media[0]}`, which is not read")
        speaker = speaker.strip().lower()
        images = {field: turn[field] for field in IMAGE_FIELDS if turn.get(field)} or None
        if speaker in CALLS:
            return Said("assistant", self._calls(_json(words, "a call of a function")), images, _trained(turn))
        if speaker in RESULTS:
            return Said("user", self._result(turn, words), images)
        if speaker in SYSTEM:
            return Said("user", self._plain(words), images, system=True)
        role = SPEAKERS.get(speaker)
        if role is None:
            allowed = ", ".join([*SPEAKERS, *SYSTEM, *CALLS, *RESULTS])
            raise Malformed(f"a turn is from {speaker!r}; allowed: {allowed}")
        words = self._plain(words)
        if calls := turn.get("tool_calls") or turn.get("function_call"):
            text = self._calls(calls)
            words = [*words, {"type": "text", "text": text}] if isinstance(words, list) else words + text
        return Said(role, words, images, _trained(turn))

    def _plain(self, words: str | list[Any]) -> str | list[Any]:
        if not self._tools:
            return words
        if isinstance(words, str):
            return without_marks(words)
        return [
            {**part, "text": without_marks(part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in words
        ]

    def _calls(self, calls: Any) -> str:
        texts = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            name = function.get("name") if isinstance(function, Mapping) else None
            if function is None or not isinstance(name, str) or not name:
                raise Malformed("a call of a function has no name")
            arguments = function.get("arguments", function.get("parameters", {}))
            texts.append(call_text(name, arguments if isinstance(arguments, str) else json.dumps(arguments)))
            if isinstance(call.get("id"), str):
                self._names[call["id"]] = name
            self._called.append(name)
        return "".join(texts)

    def _result(self, turn: Mapping[str, Any], words: str | list[Any]) -> str:
        if isinstance(words, list):
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in words):
                raise Malformed("the result of a function is no text")
            words = "".join(part["text"] for part in words)
        called = self._called.pop(0) if self._called else ""
        name = self._names.get(str(turn.get("tool_call_id")), turn.get("name") or called)
        return response_text(str(name), words)


def _plain_turn(turn: Any) -> Said | None:
    """What a turn says that has nothing but a speaker and words, where there are no tools: most turns are so."""
    if not isinstance(turn, dict) or len(turn) != 2:
        return None
    by, field = PLAIN[0] if "from" in turn else PLAIN[1]
    role, words = SPEAKERS.get(str(turn.get(by))), turn.get(field)
    return Said(role, words) if role is not None and isinstance(words, str) else None


def _has_tools(turn: Any) -> bool:
    if not isinstance(turn, Mapping):
        return False
    speaker = str(turn.get("from", turn.get("role"))).lower()
    return speaker in OF_TOOLS or bool(turn.get("tool_calls") or turn.get("function_call"))


def _tools(value: Any) -> str:
    """The text that offers a record's tools; empty without any."""
    described = _json(value, "`tools`") if isinstance(value, str) and value.strip() else value
    if not described or isinstance(described, str):
        return ""
    tools = []
    for entry in described if isinstance(described, list) else [described]:
        function = entry.get("function", entry) if isinstance(entry, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Malformed("`tools` has a tool without a name")
        parameters = function.get("parameters")
        description = function.get("description")
        tools.append(
            Tool(
                function["name"],
                description if isinstance(description, str) else "",
                dict(parameters) if isinstance(parameters, Mapping) else {},
            )
        )
    return tools_text(tools)


def _json(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is no JSON: {error}") from error


def _trained(said: Mapping[str, Any], what: str = "a turn") -> bool:
    """Whether a loss is taken on a turn, or on all of a record. Raises Malformed on shares of one, which no token can
    have."""
    trained = True
    if WITH_WEIGHT.isdisjoint(said):
        return trained
    for field in WEIGHTS:
        value = said.get(field)
        if value is None:
            continue
        if value not in (0, 1):  # True and False among them
            given = value if isinstance(value, int | float) else json_type(value)
            raise Malformed(f"`{field}` of {what} is {given}; allowed: 0, 1, false, true")
        trained = trained and bool(value)
    return trained


def _truth(value: Any) -> Any:
    """What CSV, which has no types, says of a loss."""
    return TRUTHS.get(value.strip().lower(), value) if isinstance(value, str) else value


def join_turns(turns: Iterable[tuple[Said, list[DraftSegment]]], notes: Notes) -> list[DraftSegment]:
    """The segments of all turns; those of one role that follow each other stand a blank line apart.

    An exchange whose question or answer is empty is left out, and counted. Raises Malformed where it has an image, of
    which later turns may speak, and where nothing is left.
    """
    turns = list(turns)
    if _take_turns(turns):
        return [s if turn.trained or turn.role == "user" else _untrained(s) for turn, parts in turns for s in parts]
    groups = [(role, list(group)) for role, group in groupby(turns, key=lambda turn: turn[0].role)]
    kept: list[tuple[Role, list[tuple[Said, list[DraftSegment]]]]] = []
    left_out = 0
    for role, group in groups:
        question = kept[-1] if kept and kept[-1][0] == "user" else None
        empty = all(_is_blank(segments) for _, segments in group)
        if role == "user" or not (empty or (question is not None and _all_blank(question[1]))):
            kept.append((role, group))
            continue
        left_out += 1
        if question is not None:
            if any(not isinstance(s, Text) for said, segments in question[1] if not said.system for s in segments):
                raise Malformed("an answer is empty whose question has an image")
            kept[-1] = ("user", [turn for turn in question[1] if turn[0].system])
    if left_out:
        notes.skip("turns", "of exchanges with an empty question or answer", left_out)
    if not any(role == "assistant" for role, _ in kept):
        if left_out:
            raise Malformed("has no exchange with a question and an answer")
        notes.lack("answer")
    segments: list[DraftSegment] = []
    for role, several in groupby(kept, key=lambda turn: turn[0]):
        said = [(turn, parts) for _, group in several for turn, parts in group if not _is_blank(parts)]
        for index, (turn, parts) in enumerate(said):
            trained = turn.trained or role != "assistant"
            if index:
                segments.append(Text("\n\n", role, trained and (said[index - 1][0].trained or role != "assistant")))
            segments += parts if trained else [_untrained(part) for part in parts]
    return segments


def _take_turns(turns: Sequence[tuple[Said, list[DraftSegment]]]) -> bool:
    """Whether each turn is of another role than that before it, none is blank, and one answers: as a rule."""
    before: Role | None = None
    for said, segments in turns:
        if said.role == before or _is_blank(segments):
            return False
        before = said.role
    return any(said.role == "assistant" for said, _ in turns[:2])


def _is_blank(segments: Sequence[DraftSegment]) -> bool:
    for segment in segments:
        if not isinstance(segment, Text) or (segment.text and not segment.text.isspace()):
            return False
    return True


def _all_blank(turns: Sequence[tuple[Said, list[DraftSegment]]]) -> bool:
    return all(_is_blank(segments) for _, segments in turns)


def _untrained(segment: DraftSegment) -> DraftSegment:
    assert isinstance(segment, Text | Image | Reference)
    return replace(segment, trained=False)
