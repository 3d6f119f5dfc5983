"""The commands: a study of two real endpoints from specification to report, its server killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from typer.testing import CliRunner

from calumma.jobs.commands.main import app
from calumma.serve.http.app import create_app
from calumma.serve.protocol import Finished, GenerationRequest, ImageOutput, Started, TextDelta, TokenCount
from calumma.serve.settings import ServeSettings

from ..conftest import Step, StubBackend, free_port, listening


def calumma(*words: str, code: int = 0) -> str:
    """What a command prints. In this process: what it imports takes seconds."""
    done = CliRunner().invoke(app, ["study", *words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def endpoints(png: bytes) -> Iterator[list[dict[str, Any]]]:
    """Two OpenAI-compatible servers that answer in words and pictures."""

    def script_of(name: str) -> Any:
        def script(request: GenerationRequest) -> list[Step]:
            words = TextDelta(f"Here is one in the way of {len(name)}: ")
            return [Started(TokenCount(7)), words, ImageOutput(png), Finished("stop", TokenCount(9, 18))]

        return script

    facts = {"context": 128, "image_size": 8, "image_tokens": 16}
    with (
        listening(
            create_app(StubBackend(script=script_of("a"), facts=facts), ServeSettings(model="m", name="tiny"))
        ) as one,
        listening(
            create_app(StubBackend(script=script_of("bb"), facts=facts), ServeSettings(model="m", name="tiny"))
        ) as two,
    ):
        yield [{"name": "first", "url": f"{one}/v1"}, {"name": "second", "url": f"{two}/v1"}]


@contextmanager
def serving(folder: str, port: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable, "-c", "from calumma.jobs.commands.main import main; main()", "study", "serve", folder,
        "--port", str(port), *words,
    ]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while True:
            assert server.poll() is None, server.stderr.read() if server.stderr else ""
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        yield server
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait()
        if server.stderr:
            server.stderr.close()


def test_from_a_specification_to_a_report_and_nothing_acknowledged_is_lost_by_kills(
    endpoints: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = str(tmp_path / "study")
    prompts = [{"id": f"p{n}", "category": "how-to", "prompt": f"How? {n}"} for n in range(30)]
    away = {"name": "third", "url": f"http://127.0.0.1:{free_port()}/v1", "served_model": "x", "patience": 0}
    spec = {"name": "killed", "output": folder, "prompts": prompts, "systems": [*endpoints, away]}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(spec))
    told = calumma("create", str(file), code=1)
    assert "60 of 90 answers are stored, and stay." in told
    assert "third cannot be used" in told
    file.write_text(yaml.safe_dump({**spec, "systems": endpoints}))
    assert "0 answers asked for, 60 kept; 30 items" in calumma("create", str(file))
    invited = calumma("invite", folder, "ann", "ben", "cleo", "--url", "http://127.0.0.1:1/")
    tokens = [line.rpartition("#")[2] for line in invited.splitlines()]
    assert len(set(tokens)) == 3

    port = free_port()
    acknowledged: list[tuple[str, str]] = []
    stop = threading.Event()

    def annotate(token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        judgement = {"preference": "left", "answers": [{"fulfils": "fully"}, {"fulfils": "not"}]}
        with requests.Session() as session:
            while not stop.is_set():
                try:
                    task = session.post(
                        f"http://127.0.0.1:{port}/api/next", headers=headers, json={}, timeout=30
                    ).json()
                    if task["item"] is None and task["left"] == 0:
                        return
                    if task["item"] is None:
                        time.sleep(0.05)
                        continue
                    body = {"item": task["item"], "judgement": judgement}
                    answer = session.post(f"http://127.0.0.1:{port}/api/rate", headers=headers, json=body, timeout=30)
                    if answer.ok:
                        acknowledged.append((token, task["item"]))
                except (requests.RequestException, ValueError):
                    time.sleep(0.05)

    people = [threading.Thread(target=annotate, args=(token,)) for token in tokens]
    for person in people:
        person.start()
    try:
        with serving(folder, port) as server:
            while len(acknowledged) < 40:
                time.sleep(0.01)
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
        with serving(folder, port):
            for person in people:
                person.join(120)
    finally:
        stop.set()
        for person in people:
            person.join()

    exported = tmp_path / "all.jsonl"
    calumma("export", folder, str(exported))
    items = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [len(item["ratings"]) for item in items] == [3] * 30
    assert all(len({rating["annotator"] for rating in item["ratings"]}) == 3 for item in items)
    by_token = dict(zip(tokens, ("ann", "ben", "cleo"), strict=True))
    kept = {(rating["annotator"], item["item"]) for item in items for rating in item["ratings"]}
    assert {(by_token[token], item) for token, item in acknowledged} <= kept
    assert len(kept) == 90

    assert "90 judgements by 3 people, 30 of 30 items have 3" in calumma("report", folder)
    assert (tmp_path / "study" / "report" / "report.html").exists()
    assert "pairs" in calumma("export", folder, str(tmp_path / "pairs.jsonl"), "--format", "preferences")
    assert "0 judgements are new, 90 were there already" in calumma("import", folder, str(exported))
    calumma("invite", folder, "ann", "--revoke")
    assert calumma("invite", folder) == "ben (annotator)\ncleo (annotator)\n"


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    assert "holds no study" in calumma("report", str(tmp_path / "nowhere"), code=1)
    file = tmp_path / "study.yaml"
    file.write_text("name: x\noutput: y\nprompts: z.jsonl\nsystems: [{url: 'http://127.0.0.1:1/v1'}]\n")
    assert "needs two systems" in calumma("create", str(file), code=1)
    told = calumma("create", str(file), "--set", "kind=safety", "--set", f"output={tmp_path}/o", code=1)
    assert "z.jsonl" in told
