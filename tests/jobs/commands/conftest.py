"""A specification for the commands that run jobs."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def curate(tmp_path: Path) -> Path:
    """A specification whose job cannot start: there is no machine with so many cores."""
    file = tmp_path / "curate.yaml"
    values = {
        "storage": str(tmp_path / "storage"),
        "sources": [{"name": "text", "format": "jsonl", "location": "raw"}],
        "resources": {"workers": 100_000},
    }
    file.write_text(json.dumps(values))
    return file
