"""`calumma serve`: what it says, and that it ends exactly what was started."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from calumma.jobs.commands import serve
from calumma.platform.cluster import head as ray_head
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.cluster.head import Service
from calumma.serve.http.access.api_keys import hash_key, load_keys

from .conftest import free_port

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees, or ends, what the person who runs it is serving."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1..3", (1, 3))])
def test_replicas_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert serve.replica_range(text) == expected


@pytest.mark.parametrize("text", ["", "many", "0", "3..1", "1..", "-1"])
def test_other_replicas_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--replicas"):
        serve.replica_range(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models:/digits@champion", "digits"),
        ("models:/digits/3", "digits"),
        ("/a/b", "calumma"),
        ("s3://b/m", "calumma"),
    ],
)
def test_the_served_name_is_the_registered_one(model: str, name: str) -> None:
    assert serve.served_name(model) == name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such/model"], "there is no model directory at /no/such/model"),
        (
            ["models:/nothing@champion", "--tracking-uri", "{registry}"],
            "models:/nothing@champion is not in the registry",
        ),
        (["{folder}"], "is not a whole model directory"),
        (["{model}", "--replicas", "3..2"], "--replicas '3..2'"),
        (["{model}", "--gpus", "64"], "64 GPUs each"),
        (["{model}", "--port", "{taken}"], "choose another with --port"),
        (["{model}", "--host", "0.0.0.0"], "could use the server: give it keys (--keys FILE; `calumma serve keys add`"),
        (["{model}", "--host", "0.0.0.0", "--open", "--allowed-host", "a/b"], "allowed_hosts.0: String should match"),
        (["{model}", "--port", "70000"], "port: Input should be less than or equal to 65535"),
    ],
)
def test_a_start_that_cannot_work_says_so_before_anything_starts(
    arguments: list[str], says: str, model_directory: Path, registry: str, tmp_path: Path
) -> None:
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        known = {"folder": tmp_path, "registry": registry, "model": model_directory, "taken": listener.getsockname()[1]}
        result = RUNNER.invoke(serve.app, ["start", *(argument.format(**known) for argument in arguments), *port])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert "{'" not in result.output, "all that was given"
    assert Service.read() is None


def test_nothing_served() -> None:
    status, stop = RUNNER.invoke(serve.app, ["status"]), RUNNER.invoke(serve.app, ["stop"])
    assert (status.exit_code, stop.exit_code) == (1, 0)
    assert "nothing is being served" in status.output
    assert "nothing is being served" in stop.output


def record(url: str, process: psutil.Process | None = None, temporary: Path | None = None) -> Service:
    return Service(
        url=url,
        model="/models/tiny",
        name="tiny",
        started=time.time(),
        address="127.0.0.1:1",
        pid=process.pid if process else None,
        born=process.create_time() if process else None,
        temporary=str(temporary) if temporary else None,
    )


def test_status_shows_what_answers(url: str) -> None:
    record(url, psutil.Process()).write()
    result = RUNNER.invoke(serve.app, ["status"])
    assert result.exit_code == 0
    assert "answering" in result.output
    assert url in result.output


def test_a_second_start_is_refused(url: str, model_directory: Path) -> None:
    record(url, psutil.Process()).write()
    result = RUNNER.invoke(serve.app, ["start", str(model_directory)])
    assert result.exit_code == 1
    assert "first: calumma serve stop" in " ".join(result.output.split())


def test_a_key_is_shown_once_with_the_line_for_the_file(tmp_path: Path) -> None:
    result = RUNNER.invoke(serve.app, ["key", "alice"])
    secret, line = (text.split(maxsplit=1)[1] for text in result.output.splitlines())
    (tmp_path / "keys").write_text(line + "\n")
    [key] = load_keys(tmp_path / "keys")
    assert (key.name, key.sha256) == ("alice", hash_key(secret))
    assert secret not in line


@pytest.mark.parametrize(
    ("file", "arguments", "says"),
    [
        ("limits: {tokns: 5}", [], "limits.tokns: Extra inputs are not permitted"),
        ("- a", [], "must hold fields and their values, found list"),
        ("a: [", [], "is no YAML"),
        ("{}", ["--also", "small"], "give NAME=MODEL"),
        ("{}", ["--also", "tiny=/elsewhere", "--name", "tiny"], "the name tiny is given more than once"),
        ("{}", ["--also", "small=/no/such/model"], "there is no model directory at /no/such/model"),
        ("safety: {policy: 'nowhere:policy'}", ["--port", "0"], "port: Input should be greater"),
        ("{}", ["--keys", "{folder}/keys"], "Keys are given by their hash"),
        ("also: [{name: big, model: '{model}', gpus_per_replica: 64}]", [], "64 GPUs each"),
        ("{}", ["--tensor-parallel", "2", "--gpus", "1"], "gpus_per_replica must be 2, or 0"),
        ("{}", ["--tensor-parallel", "3"], "2 heads cannot be cut into 3 parts: use at most 2 processes"),
    ],
)
def test_a_configuration_that_cannot_work_is_told(
    file: str, arguments: list[str], says: str, model_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("sk-calumma-plain\n")
    (tmp_path / "serve.yaml").write_text(file.replace("{model}", str(model_directory)))
    words = [str(model_directory), "--config", str(tmp_path / "serve.yaml"), "--port", str(free_port()), *arguments]
    result = RUNNER.invoke(serve.app, ["start", *(word.replace("{folder}", str(tmp_path)) for word in words)])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert "sk-calumma-plain" not in result.output
    assert Service.read() is None


# A head with a child that has a child, all of which ignore a polite request to end.
FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth = int(sys.argv[2])
child = subprocess.Popen([sys.executable, sys.argv[0], "-", str(depth - 1)]) if depth else None
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[psutil.Process]:
    monkeypatch.setattr(ray_head, "SHUTDOWN_TIMEOUT", 1.0)
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    process = subprocess.Popen(
        [sys.executable, str(script), "-", "2"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
    yield psutil.Process(process.pid)
    for left in [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
        left.kill()
    process.wait()
    process.stdout.close()


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_stop_ends_the_whole_family_and_nothing_else(head: psutil.Process, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        family = [head, *head.children(recursive=True)]
        temporary = tmp_path / "sockets"
        temporary.mkdir()
        record("http://127.0.0.1:1", head, temporary).write()
        result = RUNNER.invoke(serve.app, ["stop"])
        assert result.exit_code == 0
        assert len(family) == 3
        assert not any(running(process) for process in family)
        assert bystander.poll() is None
        assert not temporary.exists()
        assert Service.read() is None
        bystander.kill()


@pytest.mark.parametrize(("listens", "arguments"), [(True, []), (False, []), (True, ["--now"])])
def test_stop_drains_whenever_the_head_lives_and_asks_nobody_else(
    listens: bool, arguments: list[str], head: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained: list[Any] = []
    monkeypatch.setattr(ray_head, "connected", lambda address, ours: nullcontext())
    monkeypatch.setattr("calumma.serve.deploy.endpoint.undeploy", lambda *given: drained.append(given))
    with socket.socket() as gcs:  # takes connections, and answers nothing
        gcs.bind(("127.0.0.1", 0))
        if listens:
            gcs.listen()
        port = gcs.getsockname()[1]
        nobody = "http://127.0.0.1:1"
        replace(record(nobody, head), address=f"127.0.0.1:{port}", drain_seconds=77.0).write()
        result = RUNNER.invoke(serve.app, ["stop", *arguments])
    assert result.exit_code == 0, result.output
    assert drained == ([("tiny", 77.0)] if listens and not arguments else [])
    assert not running(head)
    assert Service.read() is None


def test_a_head_that_cannot_be_drained_is_ended_and_it_is_said(
    head: psutil.Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("the controller is gone")

    monkeypatch.setattr(ray_head, "connected", lambda address, ours: nullcontext())
    monkeypatch.setattr(Service, "listens", True)
    monkeypatch.setattr("calumma.serve.deploy.endpoint.undeploy", lost)
    record("http://127.0.0.1:1", head).write()
    result = RUNNER.invoke(serve.app, ["stop"])
    assert result.exit_code == 0
    assert "not drained: the controller is gone" in result.output
    assert not running(head)


def test_a_process_that_got_the_number_later_is_not_ended() -> None:
    me = psutil.Process()
    stale = record("http://127.0.0.1:1", me)
    stale = Service(**{**stale.__dict__, "born": me.create_time() - 1000})
    stale.write()
    assert not stale.alive
    assert "ended unexpectedly" in RUNNER.invoke(serve.app, ["status"]).output
    assert RUNNER.invoke(serve.app, ["stop"]).exit_code == 0
    assert Service.read() is None


def test_a_record_that_cannot_be_read_is_named(cache: Path) -> None:
    (cache / "calumma").mkdir(parents=True)
    (cache / "calumma" / "serve.json").write_text("{")
    with pytest.raises(ClusterError, match=r"serve\.json"):
        Service.read()
    assert RUNNER.invoke(serve.app, ["stop"]).exit_code == 1


def test_the_token_is_private_and_stays() -> None:
    first = ray_head.authentication()
    token = Path(first["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) >= 32
    assert (ray_head.authentication(), token.read_text()) == (first, token.read_text())
