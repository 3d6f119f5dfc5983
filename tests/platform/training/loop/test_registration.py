"""A model is registered when its stage is finished already: a server that was killed meanwhile fails nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from calumma.platform import storage
from calumma.platform.specification import Tracking
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking import outbox
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.registry import model_source
from calumma.platform.tracking.server import TrackingError
from calumma.platform.training import stage
from calumma.platform.training.preparation import prepare

Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Start]]:
    """The URI of an MLflow server, a process of its own, and what starts it."""
    monkeypatch.setenv("CALUMMA_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, start_new_session=True, **quiet))  # type: ignore[call-overload]
        while True:
            assert started[-1].poll() is None, "the server did not start"
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return started[-1]
            time.sleep(0.1)

    yield f"http://127.0.0.1:{port}", start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_killed_at_the_end_fails_no_stage_and_registers_later(
    scenarios: Any, server: tuple[str, Start], s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri, start = server
    output = f"{s3}/stage"
    storage.upload(Path(scenarios.root, "stages/straight"), output)
    fields = {"output": output, "register_as": "late", "alias": "champion", "tracking": {"uri": uri}}
    spec = scenarios.specification("straight", **fields)
    living = start()
    with job_run(spec) as run:
        assignment = prepare(spec, run)
        os.killpg(living.pid, signal.SIGKILL)
        living.wait()
        published = stage._publish_stage(spec, assignment, {"steps": spec.steps})
    assert Manifest.read(output) == published
    assert "model_uri" not in published.report
    assert "the next job sends it" in caplog.text
    start()
    assert outbox.send_pending(uri) >= 1
    assert outbox.send_pending(uri) == 0
    source = model_source("models:/late@champion", Tracking(uri=uri))
    Manifest.read(source).verify(source, content=True)
    (version,) = run.client.search_model_versions("name = 'late'")
    assert (version.run_id, version.tags["calumma.step"]) == (run.id, "20")
    assert run.client.get_run(run.id).info.status == "FINISHED"


def test_a_registry_that_refuses_is_told_when_the_stage_is_published(scenarios: Any, tmp_path: Path) -> None:
    output = tmp_path / "stage"
    shutil.copytree(Path(scenarios.root, "stages/straight"), output)
    spec = scenarios.specification("straight", output=str(output), register_as="a/b:c")
    with job_run(spec) as run, pytest.raises(TrackingError, match="did not take"):
        stage._publish_stage(spec, prepare(spec, run), {"steps": spec.steps})
    assert Manifest.find(str(output)) is not None
