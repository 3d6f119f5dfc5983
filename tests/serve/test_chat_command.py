"""`calumma chat`: one question, a conversation, pictures, and errors that say what to do."""

from __future__ import annotations

import base64
import json
import socket
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image as PILImage
from typer import Typer
from typer.testing import CliRunner

from calumma.jobs.commands.chat import ChatError, ChatSession, chat, half_blocks, picture_part
from calumma.platform.cluster.head import Service
from calumma.serve.http.access.api_keys import hash_key
from calumma.serve.http.app import create_app
from calumma.serve.protocol import ImageOutput, TextDelta
from calumma.serve.settings import APIKey, Safety, ServeSettings

from .conftest import StubBackend, answered, listening
from .http.conftest import stub_settings

RUNNER = CliRunner()
CHAT = Typer()
CHAT.command()(chat)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees, or ends, what the person who runs it is serving."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


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
    talk = ChatSession(url, {"modalities": ["text"], "max_tokens": 2, "seed": 1})
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
    with listening(create_app(StubBackend(), settings)) as url:
        without = RUNNER.invoke(CHAT, ["--url", url, "--once", "hi"])
        assert without.exit_code == 1
        assert "needs an API key" in without.output
        asked = ["--url", url, "--key", "sk-a", "--model", "tiny", "--once"]
        assert "seven" in RUNNER.invoke(CHAT, [*asked, "hi"]).output
        refused = RUNNER.invoke(CHAT, [*asked, "dynamite"])
        assert (refused.exit_code, refused.output.strip()) == (1, "not here")


def test_a_server_does_not_steer_the_terminal(tmp_path: Path) -> None:
    """Titles, clipboards, colours and directions of writing in what a server sends stay away, in pieces too."""
    pieces = ["\x1b]52;c;cm0gLX", "JmIC8=\x07\x1b", "[2Jseven", "\r\u202ehundred\x9b", "31m."]
    with listening(create_app(StubBackend(*answered(*map(TextDelta, pieces))), stub_settings())) as url:
        answer = RUNNER.invoke(CHAT, ["--url", url, "--once", "hi"])
    assert (answer.exit_code, answer.output) == (0, "sevenhundred.\n")
    rules = Safety(policy="calumma.serve.safety:keywords", options={"words": ["hi"], "reason": "\x1b]0;title\x07no"})
    with listening(create_app(StubBackend(), stub_settings(safety=rules))) as url:
        assert RUNNER.invoke(CHAT, ["--url", url, "--once", "hi"]).output == "no\n"


def test_a_picture_of_a_server_that_is_none_is_neither_opened_nor_kept(tmp_path: Path) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"  # Pillow would have Ghostscript run it
    with listening(create_app(StubBackend(*answered(ImageOutput(eps))), stub_settings())) as url:
        answer = RUNNER.invoke(CHAT, ["--url", url, "--once", "hi", "--save", str(tmp_path / "pictures")])
    assert answer.exit_code == 1
    assert "a picture that is none" in answer.output
    assert not (tmp_path / "pictures").exists()


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
    text = half_blocks(picture, 40)
    assert text.plain == "▀▀▀▀\n▀▀▀▀"
    first = text.spans[0].style
    assert "#ff0000 on #0000ff" in str(first)
    assert len(half_blocks(PILImage.new("RGB", (200, 100)), 20).plain.splitlines()) == 5
    tall = half_blocks(PILImage.new("L", (1, 3)), 40)
    assert len(tall.plain.splitlines()) >= 1
