"""What waits for MLflow on disk: a server that goes away and comes back, writers that are killed, other machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from werkzeug.serving import make_server

from calumma.platform import storage
from calumma.platform.specification import Tracking
from calumma.platform.tracking import outbox
from calumma.platform.tracking import server as server_module
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import TrackingError, resolve_uri
from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training.specification import PretrainSpecification


def specification(uri: str, **fields: Any) -> PretrainSpecification:
    return PretrainSpecification(
        storage="/data", mixture={"tokens": 1.0}, output="stage", steps=1, micro_batches=1, initial="x",
        tracking=Tracking(uri=uri, experiment="tests"), **fields,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where outboxes are; and a client that tells at once that there is nobody."""
    monkeypatch.setenv("CALUMMA_OUTBOX", str(tmp_path / "outbox"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return tmp_path / "outbox"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_uri(Tracking(uri=str(tmp_path_factory.mktemp("mlflow"))))


@pytest.fixture
def run(database: str) -> Iterator[Run]:
    with job_run(specification(database)) as current:
        yield current


class Server:
    """An MLflow tracking server that can be stopped and started again."""

    def __init__(self, database: str, artifacts: Path) -> None:
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = database
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts.as_uri()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    @contextmanager
    def up(self) -> Iterator[None]:
        from mlflow.server import app

        server = make_server("127.0.0.1", self.port, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    before = dict(os.environ)
    yield Server(database, tmp_path_factory.mktemp("artifacts"))
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def losses(run: Run) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in run.client.get_metric_history(run.id, "loss")]


def test_a_server_that_is_stopped_and_started_gets_everything_in_the_end(server: Server, boxes: Path) -> None:
    with server.up():
        recording = job_run(specification(server.uri))
        run = recording.__enter__()
        writer = BackgroundWriter(run)
        writer.log({"loss": 10.0}, 0)
        assert writer.flush(60)
    for step in range(1, 6):  # nobody answers
        writer.log({"loss": 10.0 - step}, step)
    writer.log_dict({"a": 1}, "notes/a.json")
    writer.log_image(Image.new("RGB", (4, 4), "red"), "samples/0.png")
    writer.log_checkpoint("step-5", "s3://somewhere/step-5", 5, {"loss": 5.0}, {})
    writer.log_tags({"calumma.note": "away"})
    assert not writer.flush(0.3)
    assert len(list(boxes.glob("*/*/[0-9]*.json"))) == 9
    with server.up():
        assert writer.flush(60)
        writer.log({"loss": 4.0}, 6)
        assert writer.close() == 0
        assert losses(run) == [(step, 10.0 - step) for step in range(7)]
        found = run.client.get_run(run.id)
        assert found.data.tags["calumma.note"] == "away"
        assert [a.path for folder in ("notes", "samples") for a in run.client.list_artifacts(run.id, folder)] == [
            "notes/a.json",
            "samples/0.png",
        ]
        (model,) = run.client.search_logged_models([found.info.experiment_id])
        assert model.tags["calumma.uri"] == "s3://somewhere/step-5"
    recording.__exit__(None, None, None)  # the run ends while nobody answers
    with server.up():
        assert run.client.get_run(run.id).info.status == "RUNNING"
        with job_run(specification(server.uri)):  # the next job
            assert run.client.get_run(run.id).info.status == "FINISHED"
    assert not list(boxes.glob("*/*"))


def test_metrics_that_are_not_taken_are_sent_again_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    send, broken = run.client.log_batch, True

    def flaky(*arguments: Any, **fields: Any) -> None:
        if broken:
            raise sqlite3.OperationalError("database is locked")
        send(*arguments, **fields)

    monkeypatch.setattr(run.client, "log_batch", flaky)
    writer = BackgroundWriter(run)
    for step in range(5):
        writer.log({"loss": 5.0 - step}, step)
    assert not writer.flush(0.2)
    broken = False
    writer.log({"loss": 0.0}, 5)
    assert writer.close() == 0
    assert losses(run) == [(step, 5.0 - step) for step in range(6)]


def test_what_a_server_that_stays_away_has_not_taken_is_counted_and_waits(
    run: Run, monkeypatch: pytest.MonkeyPatch, boxes: Path
) -> None:
    def refuse(*arguments: Any, **fields: Any) -> None:
        raise ConnectionError("away")

    monkeypatch.setattr(run.client, "log_batch", refuse)
    writer = BackgroundWriter(run, close_timeout=0.2)
    writer.log({"loss": 1.0, "z": 2.0}, 1)
    writer.log_dict({"a": 1}, "a.json")
    assert writer.close() == 3
    assert outbox.main() == 0  # another client: this one is let in
    assert losses(Run(run.uri, run.id)) == [(1, 1.0)]
    assert not list(boxes.glob("*/*"))


KILLED = """
import sys
from calumma.platform.tracking.outbox import Outbox
outbox = Outbox.new(sys.argv[1], sys.argv[2])
for step in range(3):
    outbox.put("metrics", {"values": [["loss", 3.0 - step, 1000, step]]})
print("written", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_writer_leaves_is_sent_by_the_next_and_a_living_ones_is_left_alone(run: Run) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, run.uri, run.id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    assert outbox.send_pending(run.uri) == 0
    assert losses(run) == []
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert BackgroundWriter(run).close() == 0
    assert losses(run) == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_what_is_parked_in_storage_is_sent_from_another_machine(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parked = str(tmp_path / "stage/tracking")
    monkeypatch.setattr(run.client, "log_batch", lambda *a, **f: (_ for _ in ()).throw(ConnectionError("away")))
    writer = BackgroundWriter(run, parked, close_timeout=0.2)
    writer.log({"loss": 1.0}, 1)
    writer.close()
    monkeypatch.setenv("CALUMMA_OUTBOX", str(tmp_path / "another machine"))
    there = Run(run.uri, run.id)
    writer = BackgroundWriter(there, parked)
    writer.log({"loss": 0.5}, 2)
    assert writer.close() == 0
    assert losses(there) == [(1, 1.0), (2, 0.5)]
    assert storage.list_files(parked) == []


def test_what_the_server_will_never_take_is_put_aside_and_holds_nothing_up(run: Run, boxes: Path) -> None:
    writer = BackgroundWriter(run)
    writer.log({"loss": 1.0}, 1)
    writer.log_checkpoint("no/name: of a model", "s3://somewhere", 1, {}, {})
    writer.log({"loss": 0.5}, 2)
    assert writer.close() == 0
    assert losses(run) == [(1, 1.0), (2, 0.5)]
    (refused,) = boxes.glob("*/*/refused/*.json")
    assert json.loads(refused.read_text())["content"]["name"] == "no/name: of a model"


def test_names_that_mlflow_refuses_become_others_and_nothing_is_lost(run: Run) -> None:
    run.log_metrics({"curated+v2/documents": 1.0, "curated_v2/documents": 2.0, "größe!": 3.0})
    writer = BackgroundWriter(run)
    writer.log({"a+b": 4.0, "a*b": 5.0}, 1)
    assert writer.close() == 0
    assert run.latest() == {
        "curated_v2/documents": 1.0,
        "curated_v2/documents 2": 2.0,
        "größe_": 3.0,
        "a_b": 4.0,
        "a_b 2": 5.0,
    }


def test_a_job_whose_server_has_gone_away_ends_and_what_it_logs_waits(
    server: Server, boxes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with server.up():
        recording = job_run(specification(server.uri))
        run = recording.__enter__()
    (tmp_path / "report.html").write_text("<p>told</p>")
    run.log_metrics({"documents": 3.0})  # nobody answers
    run.log_image(Image.new("RGB", (4, 4), "red"), "samples/0.png")
    run.log_artifact(tmp_path / "report.html")
    run.log_tags({"calumma.note": "away"})
    recording.__exit__(None, None, None)
    assert caplog.text.count("does not take what run") == 1
    assert len(list(boxes.glob("*/*/[0-9]*.json"))) == 5
    with server.up():
        assert outbox.main() == 0
        found = run.client.get_run(run.id)
        assert found.data.metrics["documents"] == 3.0
        assert found.data.tags["calumma.note"] == "away"
        assert found.info.status == "FINISHED"
        assert {a.path for a in run.client.list_artifacts(run.id)} == {"report.html", "samples"}
    assert not list(boxes.glob("*/*"))


def test_a_server_that_does_not_answer_is_told_at_once_and_counted_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = [0.0]
    monkeypatch.setattr(server_module.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(server_module.time, "sleep", lambda pause: seconds.append(seconds.pop() + pause))
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
    match = f"MLflow at {uri} does not answer .*refused.*, tried for 60 s"
    with pytest.raises(TrackingError, match=match), job_run(specification(uri)):
        pass
    told = [record.message for record in caplog.records if "does not answer" in record.message]
    assert [message.rpartition("; ")[2] for message in told[:2]] == ["tried for 60 s more", "tried for 55 s more"]
    assert len(told) == 12


def test_whatever_a_server_answers_it_is_there() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(int(codes.pop(0)))

        def log_message(self, *arguments: object) -> None:
            pass

    codes = [401, 404, 500, 503]
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{http.server_port}"
        assert [server_module.unreachable(uri) for _ in range(4)] == [None, None, None, "status 503"]
        http.shutdown()
    assert server_module.unreachable("sqlite:///nowhere") is None


def test_sending_twice_changes_nothing(run: Run) -> None:
    values = [("loss", 1.0, 1000, 1), ("loss", 0.5, 2000, 2)]
    for _ in range(2):  # as after a kill between sending and taking note of it
        run.log_values(values)
        run.log_checkpoint("step-2", "/somewhere", 2, {"loss": 0.5}, {}, 3000)
        run.log_data({"/data/tokens": "f" * 64}, "training")
    assert losses(run) == [(1, 1.0), (2, 0.5)]
    found = run.client.get_run(run.id)
    mine = f"source_run_id = '{run.id}'"
    assert len(run.client.search_logged_models([found.info.experiment_id], filter_string=mine)) == 1
    assert len(found.inputs.dataset_inputs) == 1


def test_a_disk_that_is_full_costs_entries_and_not_the_training(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = BackgroundWriter(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        writer.log({"loss": 1.0}, 1)
    writer.log({"loss": 0.5}, 2)
    writer.close()
    assert losses(run) == [(2, 0.5)]
    assert "metrics for MLflow could not be kept on disk and is lost: [Errno 28] No space left" in caplog.text


def test_where_no_home_can_be_written_outboxes_are_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALUMMA_OUTBOX")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert outbox.root() == tmp_path / "state/calumma/outbox"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert outbox.root() == Path(tempfile.gettempdir(), "calumma-outbox")


def test_many_metrics_arrive_in_few_requests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    send, sizes = run.log_values, list[int]()

    def counted(values: Any) -> None:
        sizes.append(len(values))
        send(values)

    monkeypatch.setattr(run, "log_values", counted)
    box = outbox.Outbox.new(run.uri, run.id)
    for step in range(150):
        box.put("metrics", {"values": [[f"loss{i}", 1.0, 1000, step] for i in range(10)]})
    box.send(run)
    box.close()
    assert sizes == [1000, 500]
