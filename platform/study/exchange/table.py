"""The formats by their names, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from calumma.platform import storage
from calumma.platform.study.exchange import argilla, json_lines, label_studio, preferences
from calumma.platform.study.folder import Study
from calumma.platform.study.judgement import Rating


class Unreadable(ValueError):
    """A file that is not of its format; the message says what was found where."""


def write(format: str, study: Study, ratings: Sequence[Rating], file: str) -> str:
    """Write a file, and for some formats a second one beside it; what was written, in words. Raises StorageError."""
    by_item: dict[str, list[Rating]] = {item: [] for item in study.items}
    for rating in ratings:
        if rating.item in by_item:
            by_item[rating.item].append(rating)
    if format == "preferences":
        pairs, ties = preferences.pairs(study, by_item)
        storage.write_bytes(file, _lines(pairs))
        return f"{len(pairs)} pairs; {ties} items without a winner give none"
    if format == "jsonl":
        storage.write_bytes(file, _lines(json_lines.records(study, by_item)))
        return f"{len(study.items)} items with {len(ratings)} judgements"
    if format == "label-studio":
        storage.write_bytes(file, _json(label_studio.tasks(study, by_item)))
        beside = _beside(file, "config.xml")
        storage.write_bytes(beside, label_studio.config(study).encode())
        return f"{len(study.items)} tasks with {len(ratings)} annotations; the labelling interface: {beside}"
    storage.write_bytes(file, _json(argilla.records(study, by_item)))
    beside = _beside(file, "settings.json")
    storage.write_bytes(beside, _json(argilla.settings(study)))
    return f"{len(study.items)} records with {len(ratings)} responses; the dataset's settings: {beside}"


def read(format: str, study: Study, file: str) -> list[Rating]:
    """The judgements in a file. Raises Unreadable, StorageError."""
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file} is not UTF-8 text") from error
    try:
        if format == "jsonl":
            return json_lines.ratings(study, [json.loads(line) for line in text.splitlines() if line.strip()])
        given = json.loads(text)
        return label_studio.ratings(study, given) if format == "label-studio" else argilla.ratings(study, given)
    except json.JSONDecodeError as error:
        raise Unreadable(f"{file} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise Unreadable(f"{file} is no {format} export of this study: {what}") from error


def _beside(file: str, what: str) -> str:
    folder, slash, name = file.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}.{what}"


def _lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
