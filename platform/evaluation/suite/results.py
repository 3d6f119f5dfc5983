"""What a finished task leaves behind, and its answers while it is under way: JSON that other tools read, too."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from calumma.model.document import Document, Image, Role, Segment, Text
from calumma.platform import storage
from calumma.platform.evaluation.systems.prompts import Answer
from calumma.platform.specification import SpecificationError

TASKS = "tasks"  # the folder of what finished tasks and those under way leave


class Sample(BaseModel):
    """One answer, as the page shows it; pictures are data URLs."""

    question: str
    asked: list[str] = []
    said: str
    drawn: list[str] = []
    expected: str
    values: dict[str, float]


class TaskResult(BaseModel):
    """One task's figures. `key`: what it was measured from; an equal one is not measured again. `ids` and `values`: of
    each item, for paired tests. `sheets`: pictures of all answers together, as data URLs. `contaminated`: items that
    the training data hold; None: not looked at."""

    model_config = ConfigDict(extra="forbid")

    name: str
    benchmark: str
    key: str
    headline: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    ids: list[str]
    values: dict[str, list[float]]
    failures: int = 0
    shots: int = 0
    seconds: float = 0.0
    tokens: dict[str, int] = {}
    notes: list[str] = []
    samples: list[Sample] = []
    sheets: dict[str, str] = {}
    contaminated: int | None = None

    @classmethod
    def find(cls, output: str, name: str) -> Self | None:
        """Of a run's folder; None where the task is not finished there."""
        try:
            return cls.model_validate_json(storage.read_bytes(storage.join(output, TASKS, f"{name}.json")))
        except (storage.NotFound, ValidationError):
            return None

    def write(self, output: str) -> None:
        data = self.model_dump_json(indent=1).encode() + b"\n"
        storage.write_bytes(storage.join(output, TASKS, f"{self.name}.json"), data)


class SuiteResults(BaseModel):
    """All of a run: `results.json`."""

    system: str
    suite: str
    run: str = ""
    tasks: list[TaskResult]
    left_out: dict[str, str] = {}

    @classmethod
    def read(cls, output: str) -> Self:
        """Raises SpecificationError where there is no finished run."""
        uri = storage.join(output, "results.json")
        try:
            return cls.model_validate_json(storage.read_bytes(uri))
        except storage.NotFound as error:
            raise SpecificationError(f"there is no finished run at {output}: no results.json in it") from error
        except ValidationError as error:
            raise SpecificationError(f"{uri} is not what this version writes: {error}") from error


class Verdict(BaseModel):
    """What one item's answer was worth: a line of `tasks/NAME.verdicts.jsonl`."""

    id: str
    question: str
    expected: str
    said: str
    values: dict[str, float]


def write_verdicts(output: str, name: str, verdicts: Sequence[Verdict]) -> None:
    data = "".join(f"{verdict.model_dump_json()}\n" for verdict in verdicts).encode()
    storage.write_bytes(storage.join(output, TASKS, f"{name}.verdicts.jsonl"), data)


def read_verdicts(output: str, name: str) -> list[Verdict]:
    """Of a finished task. Raises StorageError."""
    data = storage.read_bytes(storage.join(output, TASKS, f"{name}.verdicts.jsonl"))
    return [Verdict.model_validate_json(line) for line in data.decode().split("\n") if line]


# -- answers under way


def write_answers(output: str, name: str, key: str, answers: Sequence[Sequence[Answer]]) -> None:
    """All that there are so far; whole or not at all."""
    lines = [json.dumps({"key": key})]
    lines += [json.dumps([_to_json(answer) for answer in each], ensure_ascii=False) for each in answers]
    storage.write_bytes(storage.join(output, TASKS, f"{name}.jsonl"), ("\n".join(lines) + "\n").encode())


def read_answers(output: str, name: str, key: str) -> list[list[Answer]]:
    """Those of an earlier attempt at the same; none where it was another."""
    try:
        data = storage.read_bytes(storage.join(output, TASKS, f"{name}.jsonl"))
    except storage.NotFound:
        return []
    head, *lines = data.decode().split("\n")
    try:
        if json.loads(head) != {"key": key}:
            return []
        return [[_from_json(answer) for answer in json.loads(line)] for line in lines if line]
    except (ValueError, KeyError, TypeError):
        return []


def _to_json(answer: Answer) -> dict[str, Any]:
    segments = [
        {"text": s.text, "role": s.role}
        if isinstance(s, Text)
        else {"image": f"data:image/png;base64,{base64.b64encode(s.png()).decode()}", "role": s.role}
        for s in answer.document.segments
    ]
    counts = {name: getattr(answer, name) for name in _PLAIN}
    return {"segments": segments, **counts}


_PLAIN = ("prompt_tokens", "text_tokens", "image_tokens", "seconds", "finish", "error")


def _from_json(row: dict[str, Any]) -> Answer:
    segments: list[Segment] = []
    for s in row["segments"]:
        role: Role | None = s["role"]
        if "text" in s:
            segments.append(Text(s["text"], role))
        else:
            segments.append(Image(base64.b64decode(s["image"].partition(",")[2]), role=role))
    return Answer(Document(tuple(segments)), **{name: row[name] for name in _PLAIN})
