"""Penalties, biases, lists, grammars and failures are the same where a model is cut over several processes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("tensor_parallel_rules_worker.py")


def test_processes_answer_and_fail_as_one(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("tensor_parallel_rules_worker", WORKER)
    assert specification is not None
    assert specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    expected = worker.answers(None)
    processes = [subprocess.Popen([sys.executable, str(WORKER), str(rank), "2", str(tmp_path)]) for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    found = json.loads((tmp_path / "answers2.json").read_text())
    assert found == expected
    ends = {id: (finish, failure) for id, (_, finish, failure, _) in found.items()}
    assert ends["poisoned prompt"] == ends["poison drawn"] == ("failed", "not finite")
    assert ends["nothing left"] == ("failed", "no token")
    assert all(ends[id][0] in ("stop", "length") for id in ("penalized", "grammar", "images", "biased"))
    assert found["poison drawn"][0]
    grammar = found["grammar"][0]
    assert [token % 3 for token in grammar] == [number % 3 for number in range(len(grammar))]
    assert len(grammar) >= 7
