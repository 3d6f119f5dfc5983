"""`benchmarks/gpu.py` on a CPU: from a checkout that is not installed, where there is no Ray."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.py"
PARTS = {"parity", "training", "decode", "images"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Python finds our libraries, but neither calumma nor what its platform is built on."""
    absent = tmp_path_factory.mktemp("absent")
    for name in ("ray", "deepspeed", "mlflow", "transformers"):
        (absent / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    paths = [str(absent), sysconfig.get_paths()["purelib"]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_it_runs_with_pytorch_alone(bare: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [str(sys._base_executable), str(SCRIPT), "--quick", "--device", "cpu", "--output", str(output)]  # type: ignore[attr-defined]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert {row["part"] for row in rows} == PARTS
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == len(rows) + 2
    assert [row for row in rows if row.get("ok") is False] == []
    named = " ".join(row["case"] for row in rows if row.get("ok"))
    for kernel in ("flash", "math", "dense mask", "decoder's fused", "decoder's by_products", "paged decoder"):
        assert kernel in named, kernel
    assert {row["measured"] for row in rows} >= {"tokens a second", "TFLOP/s", "images a minute"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module; it and its neighbours have names that others may want."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("gpu")
    for name in ("gpu", "model", "engine"):
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


def test_a_wrong_kernel_is_told(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *given: usual(*given) * 1.001)
    wrong = {row["case"] for row in gpu.parity("cpu", True) if row.get("ok") is False}
    assert any("flash attention, causal" in case for case in wrong)
    assert not any("decoder" in case for case in wrong)


def test_a_part_that_fails_costs_itself_alone(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    (row,) = gpu.part_rows("decode", "cpu", quick=False)
    assert (row["part"], row["measured"], row["ok"]) == ("decode", "failed", False)
    assert "WRONG" in gpu.shown(row)
