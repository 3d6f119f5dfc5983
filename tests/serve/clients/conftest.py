"""Clients that none of us made, in a virtual environment of their own (`make test-clients`), against a real engine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = Path(os.environ.get("CALUMMA_CLIENTS", Path(__file__).parents[3] / ".venv-clients")).absolute()
PROGRAMS = Path(__file__).parent / "programs"
SECONDS = 300
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program of the clients' environment; its standard output. It sees no settings of the user's."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.skip(f"there are no clients in {ENVIRONMENT}: `make test-clients` installs them")

    def run(program: str, *arguments: str, **variables: str) -> str:
        keep = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        done = subprocess.run(
            [str(ENVIRONMENT / "bin" / program), *arguments],
            env=keep | offline | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return done.stdout

    return run


@pytest.fixture
def told(run: Run, url: str) -> Callable[..., dict[str, Any]]:
    """What a program of `programs/` prints, given the API's address."""

    def told(name: str, address: str = url) -> dict[str, Any]:
        answers: dict[str, Any] = json.loads(run("python", str(PROGRAMS / name), f"{address}/v1").splitlines()[-1])
        return answers

    return told
