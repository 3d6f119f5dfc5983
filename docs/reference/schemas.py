"""JSON schemas of the jobs' specifications, of serving and of studies, for editors: `jobs/recipes/schema/JOB.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs import house

FOLDER = Path("jobs/recipes/schema")
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def files() -> dict[str, str]:
    """File below FOLDER -> its text."""
    return {f"{name}.json": _text(schema(name)) for name in (*house.JOBS, "serve", "study")}


def schema(job: str) -> dict[str, Any]:
    """What an editor may accept: all that the specification takes, but for what only its validators judge."""
    found = house.settings_of(job).model_json_schema()
    for name, inner in found.get("$defs", {}).items():
        if name == house.ModelConfig.__name__:
            _allow_presets(inner)
    if job in house.JOBS:  # a file says which job it is for, whatever the default
        found["required"] = ["job", *(name for name in found.get("required", []) if name != "job")]
    return {"$schema": DIALECT, **found}


def _allow_presets(model: dict[str, Any]) -> None:
    """A shape may begin with a preset's name, and then needs nothing else."""
    model["properties"]["preset"] = {"enum": sorted(house.PRESETS), "description": "a published shape to start from"}
    model["anyOf"] = [{"required": ["preset"]}, {"required": model.pop("required")}]


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
