"""Requests to the HTTP application from within its process, for batches: checked and answered as all others are."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

from fastapi import FastAPI

from calumma.serve.batches.runner import Ask, Reply
from calumma.serve.http.access.caller import Caller

FAILED = json.dumps({"error": {"message": "the server failed to answer", "type": "server_error"}}).encode()


def in_process(app: FastAPI) -> Ask:
    async def ask(owner: str, path: str, body: bytes) -> Reply:
        """owner: on whose behalf."""
        headers = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body))}
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": {"caller": Caller.batches_of(owner)},
        }
        status, chunks, unread = 500, [], [body]

        async def receive() -> Any:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await asyncio.get_running_loop().create_future()  # it never disconnects

        async def send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))

        try:
            await app(scope, receive, send)
        except Exception:  # it is logged, and answered where nothing was
            if not chunks:
                status, chunks = 500, [FAILED]
        return Reply(status, b"".join(chunks), f"req_{uuid.uuid4().hex}")

    return ask
