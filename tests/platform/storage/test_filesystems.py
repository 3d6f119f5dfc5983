"""Storage that is not S3's kind: Hugging Face's hub, Google's and Azure's. The hub is a small server of its protocol,
spoken to by huggingface_hub itself; Google's is a server of its JSON protocol, spoken to by Arrow's own client. Azure's
is Azurite, Microsoft's own emulator, where `azurite-blob` is on the PATH (npm install azurite)."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from calumma.platform import storage
from calumma.platform.sources.reading import read_source, require_files
from calumma.platform.sources.specification import Source
from calumma.platform.storage import filesystems
from calumma.platform.storage.uri import READ_ONLY


@dataclass
class Server:
    """What an HTTP server holds, and what it was asked."""

    files: dict[str, bytes]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)
    broken: int = 0  # answers that break off
    parts: dict[str, bytes] = field(default_factory=dict)  # uploads that are not finished


def serve(server: Server, answer: Any) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append(self.path)
            answer(self, server)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
            self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def send_file(self, data: bytes, **headers: str) -> None:
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            begin, _, end = wanted.partition("-")
            part = data[int(begin or 0) : int(end) + 1 if end else None]
            told = f"bytes {begin or 0}-{int(begin or 0) + len(part) - 1}/{len(data)}"
            self.send(206 if wanted else 200, part, Content_Range=told, Accept_Ranges="bytes", **headers)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    yield server
    http.shutdown()
    http.server_close()
    thread.join()


# -- Hugging Face's hub: https://huggingface.co/docs/hub/api

NAME, COMMIT = "org/pictures", "0123456789abcdef0123456789abcdef01234567"


def hub_answer(request: Any, server: Server) -> None:
    path = unquote(urlsplit(request.path).path)
    api, page = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
    if path.startswith(api):
        _, _, rest = path.removeprefix(api).partition("/")
        action, _, where = rest.partition("/")
        revision, _, folder = where.partition("/")
        if where and revision not in ("main", "v1"):
            request.send_json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif action == "tree" and folder in server.files:
            request.send_json({"error": f"{folder} is no folder"}, 404, X_Error_Code="EntryNotFound")
        elif action == "tree":
            request.send_json(entries(server.files, folder, "recursive" in request.path))
        else:
            request.send_json({"id": NAME, "sha": COMMIT, "private": False, "siblings": []})
    elif path.startswith(page) and (name := path.removeprefix(page).partition("/")[2]) in server.files:
        request.send_file(server.files[name], ETag='"x"', X_Repo_Commit=COMMIT)
    elif path.startswith("/api/datasets/"):
        request.send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
    else:
        request.send_json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")


def entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{folder}/" if folder else ""
    for name, data in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            if recursive or depth == 1:
                path = prefix + "/".join(parts[:depth])
                found[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        if recursive or len(parts) == 1:
            found[name] = {"type": "file", "oid": "1" * 40, "size": len(data), "path": name}
    return list(found.values())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    lines = b"".join(json.dumps({"text": f"text {n} " + "x" * 50}).encode() + b"\n" for n in range(500))
    server = Server({"README.md": b"# Pictures", "data/a.jsonl": lines, "data/more/b.jsonl": lines[:-1]})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for answers in serve(server, hub_answer):
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield answers


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_dataset_of_the_hub_is_listed_and_read(hub: Server, revision: str) -> None:
    base = f"hf://datasets/{NAME}{revision}"
    assert storage.sizes(base) == {f"{base}/{name}": len(data) for name, data in hub.files.items()}
    assert storage.list_files(f"{base}/data/more") == [f"{base}/data/more/b.jsonl"]
    assert storage.sizes(f"{base}/data/a.jsonl") == {f"{base}/data/a.jsonl": len(hub.files["data/a.jsonl"])}
    assert storage.read_bytes(f"{base}/README.md") == b"# Pictures"
    assert storage.read_range(f"{base}/data/a.jsonl", 100, 50) == hub.files["data/a.jsonl"][100:150]
    assert storage.size(f"{base}/data/a.jsonl") == len(hub.files["data/a.jsonl"])
    with storage.open_read(f"{base}/data/a.jsonl", buffer=4096) as file:
        file.seek(-100, 2)
        assert file.read() == hub.files["data/a.jsonl"][-100:]
    assert storage.relative(f"{base}/data/a.jsonl", base) == "data/a.jsonl"
    assert [storage.exists(f"{base}/{name}") for name in ("data", "README.md", "nothing")] == [True, True, False]


def test_a_source_lies_on_the_hub(hub: Server) -> None:
    source = Source(name="s", format="text", location=f"hf://datasets/{NAME}/data")
    files, _ = require_files(source)
    items = [item for uri in files for item in read_source(source, uri)]
    assert len(items) == 1000
    assert hub.asked, "it was asked over HTTP"


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("hf://datasets/org/nothing", "HF_TOKEN"),
        (f"hf://datasets/{NAME}@v9", "revision"),
        ("hf://datasets", "hf://datasets"),
    ],
)
def test_what_the_hub_does_not_have_is_said(hub: Server, location: str, said: str) -> None:
    with pytest.raises(storage.StorageError, match=said):
        storage.sizes(location)


def test_a_file_that_the_hub_does_not_have_is_not_found(hub: Server) -> None:
    for read in (storage.read_bytes, storage.open_read, storage.size):
        with pytest.raises(storage.NotFound):
            read(f"hf://datasets/{NAME}/nothing.txt")
    assert storage.sizes(f"hf://datasets/{NAME}/nothing") == {}


def test_a_hub_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(storage.StorageError, match="HF_ENDPOINT and the network"):
        storage.sizes(f"hf://datasets/{NAME}")


@pytest.mark.parametrize("scheme", READ_ONLY)
def test_nothing_is_written_where_things_are_only_read(tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}://datasets/org/name"
    (tmp_path / "a").write_text("a")
    for write in (
        lambda: storage.write_bytes(f"{uri}/a", b"a"),
        lambda: storage.upload(tmp_path, uri),
        lambda: storage.delete(f"{uri}/a"),
        lambda: storage.check_writable(uri),
    ):
        with pytest.raises(storage.StorageError, match=f"{scheme}:// is only read; write to s3://"):
            write()


# -- Google Cloud Storage: https://cloud.google.com/storage/docs/json_api


DATE = "2024-01-01T00:00:00.000Z"


def google_answer(request: Any, server: Server) -> None:
    url = urlsplit(request.path)
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    path = unquote(url.path)

    def about(name: str) -> dict[str, Any]:
        return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(server.files[name])),
                "generation": "1", "updated": DATE, "timeCreated": DATE}  # fmt: skip

    base = "/storage/v1/b/bucket/o"
    if path == f"/upload{base}":
        google_upload(request, server, query, about)
        return
    name = path.removeprefix(base).removeprefix("/") if path.startswith(base) else path.removeprefix("/bucket/")
    if path == base:
        found = [about(each) for each in server.files if each.startswith(query.get("prefix", ""))]
        request.send_json({"kind": "storage#objects", "items": found})
    elif name not in server.files:
        request.send_json({"error": {"code": 404, "message": f"No such object: bucket/{name}"}}, 404)
    elif request.command == "DELETE":
        del server.files[name]
        request.send(204)
    elif "alt" in query or not path.startswith(base):
        request.send_file(server.files[name], x_goog_generation="1", Content_Type="application/octet-stream")
    else:
        request.send_json(about(name))


def google_upload(request: Any, server: Server, query: dict[str, str], about: Any) -> None:
    """A resumable upload: an address is asked for, parts are put there, and the last makes an object of them."""
    content = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    name = query["name"]
    if request.command == "POST":
        server.parts[name] = b""
        request.send_json({}, Location=f"{server.endpoint}{request.path}&upload_id=1")
        return
    server.parts[name] += content
    if request.headers.get("Content-Range", "").endswith("/*"):
        request.send(308, Range=f"bytes=0-{len(server.parts[name]) - 1}")
        return
    server.files[name] = server.parts.pop(name)
    request.send_json(about(name))


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server({"raw/a.txt": b"0123456789" * 1000, "raw/more/b.txt": b"b", "rawer": b"c"})
    for answers in serve(server, google_answer):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        yield answers


def test_googles_storage_is_listed_and_read(google: Server) -> None:
    assert storage.sizes("gs://bucket/raw") == {"gs://bucket/raw/a.txt": 10000, "gs://bucket/raw/more/b.txt": 1}
    assert storage.sizes("gs://bucket/raw/a.txt") == {"gs://bucket/raw/a.txt": 10000}
    assert storage.read_bytes("gs://bucket/raw/more/b.txt") == b"b"
    assert storage.read_range("gs://bucket/raw/a.txt", 15, 10) == b"5678901234"
    with storage.open_read("gs://bucket/raw/a.txt") as file:
        file.seek(-5, 2)
        assert file.read() == b"56789"
    assert storage.sizes("gs://bucket/nothing") == {}
    with pytest.raises(storage.NotFound):
        storage.read_bytes("gs://bucket/nothing")


def write_and_delete(base: str, folder: Path) -> None:
    """What jobs do with storage, below a folder that has nothing."""
    storage.check_writable(base)
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_bytes(bytes(range(256)) * 20_000)
    (folder / "manifest.json").write_text("{}")
    storage.upload(folder, f"{base}/a")
    assert storage.sizes(base) == {f"{base}/a/manifest.json": 2, f"{base}/a/model/weights": 5_120_000}
    assert storage.read_range(f"{base}/a/model/weights", 300, 3) == bytes((44, 45, 46))
    storage.write_bytes(f"{base}/a/manifest.json", b"[1]")
    storage.download(f"{base}/a", folder / "back")
    assert (folder / "back/manifest.json").read_bytes() == b"[1]"
    assert (folder / "back/model/weights").read_bytes() == (folder / "model/weights").read_bytes()
    storage.delete(f"{base}/a/nothing")
    with pytest.raises(storage.StorageError, match="refusing to delete a whole bucket"):
        storage.delete(base.rpartition("/")[0])
    storage.delete(base)
    assert storage.sizes(base) == {}
    assert not storage.exists(f"{base}/a")


def test_googles_storage_is_written_and_deleted(google: Server, tmp_path: Path) -> None:
    write_and_delete("gs://bucket/corpus", tmp_path)
    assert set(google.files) == {"raw/a.txt", "raw/more/b.txt", "rawer"}


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "devstoreaccount1")  # the emulator's own, known to everybody
    monkeypatch.setenv(
        "AZURE_STORAGE_KEY",
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    )
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_HOST", f"http://127.0.0.1:{port}")
    arguments = ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--blobPort", str(port)]
    with subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL) as server:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        filesystems._arrow("az").create_dir("box")
        yield
        server.terminate()


def test_azures_storage_is_written_and_deleted(azure: None, tmp_path: Path) -> None:
    write_and_delete("az://box/corpus", tmp_path / "files")


def test_azures_readers_see_a_whole_file_or_none(azure: None) -> None:
    seen: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            with contextlib.suppress(storage.NotFound):
                seen.add(len(storage.read_bytes("az://box/shard")))

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(8):
        storage.write_bytes("az://box/shard", bytes(1 << 20))
    ended.set()
    reader.join()
    assert seen == {1 << 20}


def test_azure_says_which_account_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(storage.StorageError, match="set AZURE_STORAGE_ACCOUNT"):
        storage.sizes("az://container/raw")
