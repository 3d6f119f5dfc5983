"""`calumma serve` and `calumma chat`: what they say, and that they end exactly what was started."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image as PILImage
from typer import Typer
from typer.testing import CliRunner

from calumma.jobs.commands import serve
from calumma.jobs.commands.chat import ChatError, Conversation, blocks, chat, picture_part
from calumma.platform.cluster import head as ray_head
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.cluster.head import Service
from calumma.serve.deploy.preparation import ServeError, locate_directory, require_port
from calumma.serve.http.access.api_keys import hash_key, load_keys
from calumma.serve.http.app import create_app
from calumma.serve.settings import APIKey, Safety, ServeSettings

from .conftest import free_port, listening
from .test_protection import Stub

RUNNER = CliRunner()
CHAT = Typer()
CHAT.command()(chat)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees, or ends, what the person who runs it is serving."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- serve


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
    assert Service.recorded() is None


def test_a_whole_model_directory_is_located(model_directory: Path) -> None:
    assert locate_directory(str(model_directory)) == str(model_directory)
    assert locate_directory(os.path.relpath(model_directory)) == str(model_directory)


def test_a_model_directory_that_misses_a_file_is_not(model_directory: Path, tmp_path: Path) -> None:
    for file in model_directory.rglob("*"):
        if file.is_file() and file.name != "vocabulary.json":
            target = tmp_path / file.relative_to(model_directory)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    with pytest.raises(ServeError, match=r"not a whole model directory: vocabulary\.json missing"):
        locate_directory(str(tmp_path))


def test_a_free_port_is_fine() -> None:
    require_port("127.0.0.1", free_port())


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
    assert Service.recorded() is None


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
    monkeypatch.setattr(ray_head, "PATIENCE", 1.0)
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
        assert Service.recorded() is None
        bystander.kill()


def test_a_process_that_got_the_number_later_is_not_ended() -> None:
    me = psutil.Process()
    stale = record("http://127.0.0.1:1", me)
    stale = Service(**{**stale.__dict__, "born": me.create_time() - 1000})
    stale.write()
    assert not stale.alive
    assert "ended unexpectedly" in RUNNER.invoke(serve.app, ["status"]).output
    assert RUNNER.invoke(serve.app, ["stop"]).exit_code == 0
    assert Service.recorded() is None


def test_a_record_that_cannot_be_read_is_named(cache: Path) -> None:
    (cache / "calumma").mkdir(parents=True)
    (cache / "calumma" / "serve.json").write_text("{")
    with pytest.raises(ClusterError, match=r"serve\.json"):
        Service.recorded()
    assert RUNNER.invoke(serve.app, ["stop"]).exit_code == 1


def test_the_token_is_private_and_stays() -> None:
    first = ray_head.authentication()
    token = Path(first["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) >= 32
    assert (ray_head.authentication(), token.read_text()) == (first, token.read_text())


# ---- chat


def test_one_question_saves_the_picture(url: str, tmp_path: Path) -> None:
    arguments = ["--url", url, "--once", "Draw a three.", "--answer", "image", "--save", str(tmp_path / "pictures")]
    for number in (1, 2):
        result = RUNNER.invoke(CHAT, arguments)
        assert result.exit_code == 0, result.output
        path = tmp_path / "pictures" / f"{number:04d}.png"
        assert str(path) in result.output.replace("\n", "")
        with PILImage.open(path, formats=["PNG"]) as opened:
            assert opened.size == (8, 8)


def test_a_conversation_at_the_prompt(url: str, tmp_path: Path, png: bytes) -> None:
    (tmp_path / "digit.png").write_bytes(png)
    lines = ["hello", f"/image {tmp_path / 'digit.png'}", "and this?", "/image nowhere.png", "/help", "/new", "/quit"]
    result = RUNNER.invoke(CHAT, ["--url", url, "--answer", "text", "--max-tokens", "5"], input="\n".join(lines))
    assert result.exit_code == 0
    assert "[1 picture(s)]" in result.output
    assert "cannot read nowhere.png" in result.output


def test_a_conversation_is_remembered_and_its_oldest_part_forgotten_when_it_is_too_long(url: str) -> None:
    talk = Conversation(url, {"modalities": ["text"], "max_tokens": 2, "seed": 1})
    for _ in range(2):
        list(talk.ask("x" * 40, []))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    list(talk.ask("y" * 60, []))
    assert len(talk.messages) == 4
    assert talk.messages[-2]["content"][0]["text"] == "y" * 60
    with pytest.raises(ChatError, match="context"):
        list(talk.ask("z" * 400, []))


def test_who_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        result = RUNNER.invoke(CHAT, ["--url", f"http://127.0.0.1:{probe.getsockname()[1]}", "--once", "hi"])
    assert result.exit_code == 1
    assert "calumma serve start MODEL" in " ".join(result.output.split())


def test_chat_finds_the_served_model(url: str) -> None:
    record(url, psutil.Process()).write()
    result = RUNNER.invoke(CHAT, ["--once", "hi", "--answer", "text", "--max-tokens", "3"])
    assert result.exit_code == 0, result.output


def test_chat_shows_its_key_and_is_told_a_refusal(tmp_path: Path) -> None:
    rules = Safety(policy="calumma.serve.safety:keywords", options={"words": ["dynamite"], "reason": "not here"})
    settings = ServeSettings(model="m", name="tiny", keys=(APIKey(name="a", sha256=hash_key("sk-a")),), safety=rules)
    with listening(create_app(Stub(), settings)) as url:
        without = RUNNER.invoke(CHAT, ["--url", url, "--once", "hi"])
        assert without.exit_code == 1
        assert "needs an API key" in without.output
        asked = ["--url", url, "--key", "sk-a", "--model", "tiny", "--once"]
        assert "seven" in RUNNER.invoke(CHAT, [*asked, "hi"]).output
        refused = RUNNER.invoke(CHAT, [*asked, "dynamite"])
        assert (refused.exit_code, refused.output.strip()) == (1, "not here")


def test_a_file_that_is_no_picture(tmp_path: Path, png: bytes) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.png").write_bytes(png)
    with pytest.raises(ChatError, match=r"a\.txt is not a picture"):
        picture_part(tmp_path / "a.txt")
    part = picture_part(tmp_path / "b.png")
    assert json.dumps(part["image_url"]["url"])[1:].startswith("data:image/png;base64,")
    assert base64.b64decode(part["image_url"]["url"].partition(",")[2]) == png


def test_pictures_become_half_blocks() -> None:
    picture = PILImage.new("RGB", (4, 4), "red")
    picture.paste("blue", (0, 1, 4, 2))
    text = blocks(picture, 40)
    assert text.plain == "▀▀▀▀\n▀▀▀▀"
    first = text.spans[0].style
    assert "#ff0000 on #0000ff" in str(first)
    assert len(blocks(PILImage.new("RGB", (200, 100)), 20).plain.splitlines()) == 5
    tall = blocks(PILImage.new("L", (1, 3)), 40)
    assert len(tall.plain.splitlines()) >= 1
