"""A small server of Hugging Face's hub for models (https://huggingface.co/docs/hub/api): what huggingface_hub asks to
download a snapshot and to upload a folder, large files through Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """repositories: name -> path -> content."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    token: str | None = None  # that writing needs
    endpoint: str = ""


@contextmanager
def model_hub(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name, rest = "/".join(parts[2:4]), parts[4:]
                if name not in hub.repositories:
                    self.fail(404, "RepoNotFound", "Repository not found")
                elif rest[:1] in (["revision"], ["tree"]) and rest[1] not in ("main", COMMIT):
                    self.fail(404, "RevisionNotFound", "Invalid rev id")
                elif rest[:1] == ["tree"]:
                    files = hub.repositories[name].items()
                    self.answer([{"type": "file", "oid": "1", "size": len(d), "path": p} for p, d in files])
                else:
                    files_ = [{"rfilename": path} for path in hub.repositories[name]]
                    self.answer({"id": name, "sha": COMMIT, "private": False, "siblings": files_})
            elif parts[2:3] == ["resolve"]:
                data = hub.repositories.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
                if data is None:
                    self.fail(404, "EntryNotFound", "Entry not found")
                else:
                    etag = hashlib.sha256(data).hexdigest()
                    self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
            else:
                self.fail(404, "EntryNotFound", "nothing here")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = path.strip("/").split("/")
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.fail(401, "", "Invalid username or password.")
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if name in hub.repositories:
                    told = {"error": "You already created this model repo", "url": f"{hub.endpoint}/{name}"}
                    self.answer(told, 409)
                    return
                hub.repositories[name], hub.private[name] = (
                    {},
                    asked.get("visibility") == "private" or bool(asked.get("private")),
                )
                self.answer({"url": f"{hub.endpoint}/{name}", "name": name})
            elif path.endswith("/info/lfs/objects/batch"):
                upload = [
                    {**each, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": upload})
            elif parts[-2:-1] == ["preupload"]:
                modes = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": modes})
            elif parts[-2:-1] == ["commit"]:
                files = hub.repositories["/".join(parts[2:4])]
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.blobs[value["oid"]]
                url = f"{hub.endpoint}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
                self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
            else:
                self.fail(404, "EntryNotFound", "nothing here")

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            oid = self.path.rpartition("/")[2]
            if hashlib.sha256(data).hexdigest() != oid:
                self.fail(400, "", "another content")
                return
            hub.blobs[oid] = data
            self.answer(b"")

        def answer(self, body: Any, status: int = 200, **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def fail(self, status: int, code: str, message: str) -> None:
            headers = {"X_Error_Code": code, "X_Error_Message": message} if code else {}
            self.answer({"error": message}, status, **headers)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{http.server_port}"
    try:
        yield hub
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
