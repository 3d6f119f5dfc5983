"""The text benchmarks' own files as the rows that lm-evaluation-harness's tasks ask for.

Publishers' files and those of the hub's repositories differ in a few names; both are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from calumma.platform.evaluation.benchmarks.files import (
    Row,
    field,
    files_below,
    label_list,
    rows_of,
    split_files,
)
from calumma.platform.evaluation.benchmarks.items import BenchmarkDataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
REPORTED = {"math": "test", "mmlu": "test", "gsm8k": "test", "arc_easy": "test", "arc_challenge": "test",
            "openbookqa": "test"}  # fmt: skip
FOLDERS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "openbookqa": "Main|main", "gsm8k": "main"}
MATH_SUBJECTS = {
    "algebra": "algebra", "counting_and_probability": "counting_and_prob", "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra", "number_theory": "num_theory", "prealgebra": "prealgebra",
    "precalculus": "precalc",
}  # fmt: skip
LETTERS = "ABCDEFGH"
Splits = dict[str, list[Row]]


def read_rows(benchmark: str, location: str, shots: int) -> dict[str, Splits]:
    """Subject ("" where there are none) -> the rows `asked` and the `examples`. Raises BenchmarkDataError."""
    files = [uri for uri in files_below(location) if uri.lower().endswith((*SUFFIXES, ".lst"))]
    if benchmark == "math":
        found = _math(files)
    elif benchmark == "mmlu":
        found = _mmlu(files)
    else:
        found = {"": _plain(benchmark, files, location)}
    if not any(splits["asked"] for splits in found.values()):
        raise BenchmarkDataError(f"{location} has no rows of the split {REPORTED.get(benchmark, 'validation')}")
    for subject, splits in found.items():
        if len(splits["examples"]) < shots:
            raise BenchmarkDataError(
                f"{location}{f', {subject}' if subject else ''}: {len(splits['examples'])} examples are too few for "
                f"{shots} shots; is the split for training there?"
            )
    return found


def text_of(row: Row) -> str:
    """All that a row says, for the check of contamination."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(row)
    return "\n".join(found)


def _plain(benchmark: str, files: Sequence[str], location: str) -> Splits:
    if folder := FOLDERS.get(benchmark):
        own = [uri for uri in files if re.search(rf"/({folder})/", uri)]
        files = own or files
    asked = split_files(files, REPORTED.get(benchmark, "validation")) or split_files(files, "validation")
    return {
        "asked": _rows(benchmark, asked),
        "examples": _rows(benchmark, split_files(files, "train")),
    }


def _rows(benchmark: str, files: Sequence[str]) -> list[Row]:
    rows = []
    for uri in files:
        if uri.endswith(".lst"):
            continue
        found = rows_of(uri)
        labels = _labels(uri, files)
        if labels is not None and len(labels) != len(found):
            raise BenchmarkDataError(f"{uri} has {len(found)} rows and its list of labels {len(labels)}")
        for number, row in enumerate(found):
            place = f"{uri}: row {number + 1}"
            rows.append(_normal(benchmark, row, labels[number] if labels else None, place))
    return rows


def _labels(uri: str, files: Sequence[str]) -> list[str] | None:
    path = PurePosixPath(uri)
    name = str(path.parent / f"{path.stem}-labels.lst")
    return label_list(name if "://" not in uri else uri[: -len(path.suffix)] + "-labels.lst") if any(
        other.endswith(f"/{path.stem}-labels.lst") for other in files
    ) else None  # fmt: skip


def _normal(benchmark: str, row: Row, label: str | None, place: str) -> Row:
    """A row with the hub's names, whichever it has."""

    def get(*names: str) -> Any:
        return field(row, names, place)

    match benchmark:
        case "piqa":
            return {"goal": get("goal"), "sol1": get("sol1"), "sol2": get("sol2"), "label": int(label or get("label"))}
        case "siqa":
            texts = {name: get(name) for name in ("context", "question", "answerA", "answerB", "answerC")}
            return texts | {"label": str(label or get("label"))}
        case "hellaswag":
            texts = {name: get(name) for name in ("activity_label", "ctx_a", "ctx_b", "endings")}
            return texts | {"label": str(get("label"))}
        case "winogrande":
            return {name: str(get(name)) for name in ("sentence", "option1", "option2", "answer")}
        case "boolq":
            return {"passage": get("passage"), "question": get("question"), "label": int(get("label", "answer"))}
        case "gsm8k":
            return {"question": get("question"), "answer": get("answer")}
        case _:  # ARC and OpenBookQA
            question, choices = get("question_stem", "question"), row.get("choices")
            if isinstance(question, dict):
                question, choices = field(question, ("stem",), place), field(question, ("choices",), place)
            if isinstance(choices, list):
                choices = {name: [field(choice, (name,), place) for choice in choices] for name in ("text", "label")}
            name = "question_stem" if benchmark == "openbookqa" else "question"
            return {name: question, "choices": choices, "answerKey": str(get("answerKey"))}


def _math(files: Sequence[str]) -> dict[str, Splits]:
    """MATH: train/algebra/1.json …, or a subject's Parquet files."""
    found: dict[str, Splits] = {}
    for folder, subject in MATH_SUBJECTS.items():
        own = [uri for uri in files if f"/{folder}/" in uri]
        parts = {
            name: [uri for uri in own if f"/{split}/" in uri or PurePosixPath(uri).name.startswith(f"{split}-")]
            for name, split in (("asked", "test"), ("examples", "train"))
        }
        if parts["asked"]:
            found[subject] = {
                name: [
                    {key: field(row, (key,), uri) for key in ("problem", "solution")}
                    for uri in uris
                    for row in rows_of(uri)
                ]
                for name, uris in parts.items()
            }
    return found or {"algebra": {"asked": [], "examples": []}}


def _mmlu(files: Sequence[str]) -> dict[str, Splits]:
    """MMLU: test/SUBJECT_test.csv with dev/SUBJECT_dev.csv, or SUBJECT/test-….parquet with SUBJECT/dev-…."""
    found: dict[str, Splits] = {}
    for uri in files:
        path = PurePosixPath(uri)
        match = re.fullmatch(r"(\w+)_(test|dev)", path.stem)
        if match is None and path.suffix == ".parquet":
            match = re.fullmatch(r"(\w+)/(test|dev)", f"{path.parent.name}/{path.name.partition('-')[0]}")
        if match is None or match[1] == "all":
            continue
        rows = [_mmlu_row(row, uri) for row in rows_of(uri)]
        splits = found.setdefault(match[1], {"asked": [], "examples": []})
        splits["asked" if match[2] == "test" else "examples"] += rows
    return {subject: splits for subject, splits in sorted(found.items()) if splits["asked"]} or {
        "": {"asked": [], "examples": []}
    }


def _mmlu_row(row: Row, uri: str) -> Row:
    if "choices" in row:
        return {"question": row["question"], "choices": row["choices"], "answer": int(row["answer"])}
    cells = list(row.values())
    if len(cells) != 6 or cells[5] not in LETTERS[:4]:
        raise BenchmarkDataError(f"{uri}: a row is no question, four answers and a letter: {cells}")
    return {"question": cells[0], "choices": cells[1:5], "answer": LETTERS.index(cells[5])}
