"""/v1/files: what clients send for batches, and what these answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from fastapi import FastAPI, Path, Query, Request
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile

from calumma.platform.storage import NotFound, StorageError
from calumma.serve.batches.records import FileRecord
from calumma.serve.batches.store import OwnerStore
from calumma.serve.http.context import ServingContext
from calumma.serve.http.wire import batches as wire
from calumma.serve.http.wire.errors import APIError
from calumma.serve.http.wire.forms import validated

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

LONGEST_NAME = 255
FORM = "multipart/form-data"
FORM_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "a request a line"},
                        "purpose": {"enum": ["batch"], "description": "what it is for"},
                        "expires_after[anchor]": {"enum": ["created_at"], "description": "what its time counts from"},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": wire.HOUR,
                            "maximum": 30 * wire.DAY,
                            "description": "after which it is deleted",
                        },
                    },
                }
            }
        },
    }
}
FileId = Annotated[str, Path(description="of the file")]


def add_files(app: FastAPI, context: ServingContext) -> None:
    def store(request: Request) -> OwnerStore:
        return context.files(request.state.owner)

    @app.post("/v1/files", response_model=wire.FileObject, openapi_extra=FORM_BODY)
    async def upload(request: Request) -> Any:
        """Keep a file of requests, one a line, for a batch."""
        own = store(request)
        name, data, form = await _read(request)
        seconds = None if form.expires_after is None else form.expires_after.seconds
        return wire.FileObject.of(await stored(own.add_file, name, data, form.purpose, seconds))

    @app.get("/v1/files", response_model=wire.FileList)
    async def files(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Any:
        """The key's files, the newest first."""
        own = store(request)

        def read(id: str) -> FileRecord | None:
            try:
                record = own.file(id)
            except NotFound:  # deleted meanwhile
                return None
            return record if purpose in (None, record.purpose) else None

        def look() -> tuple[list[FileRecord], bool]:
            ids = own.file_ids()
            return wire.page(ids if order == "desc" else ids[::-1], after, limit, read)

        found, more = await stored(look)
        return wire.FileList.of([wire.FileObject.of(record) for record in found], more)

    @app.get("/v1/files/{file_id}", response_model=wire.FileObject)
    async def file(request: Request, file_id: FileId) -> Any:
        """A file's name, size, purpose and times."""
        return wire.FileObject.of(await stored(store(request).file, file_id))

    @app.delete("/v1/files/{file_id}", response_model=wire.DeletedFile)
    async def delete_file(request: Request, file_id: FileId) -> Any:
        """Delete a file for good."""
        await stored(store(request).delete_file, file_id)
        return wire.DeletedFile(id=file_id)

    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {200: {"content": {"application/octet-stream": binary}, "description": "the file"}}

    @app.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=content)  # type: ignore[arg-type]
    async def file_content(request: Request, file_id: FileId) -> Any:
        """What is in it."""
        own = store(request)
        record = await stored(own.file, file_id)
        headers = {"Content-Length": str(record.bytes), "X-Content-Type-Options": "nosniff"}
        chunks = own.content(file_id)
        return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


async def stored(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """A function of the store, on a thread. Raises APIError: 404 on what is not there, 503 where the storage fails."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except NotFound as error:
        raise APIError("there is no such file or batch of this API key", status=404, code="not_found") from error
    except StorageError as error:
        log.exception("the storage of files and batches fails")
        raise APIError("the storage of files cannot be reached; try again", status=503) from error


async def _read(request: Request) -> tuple[str, bytes, wire.FileForm]:
    """The name and content of the form's file, and its fields. Raises APIError."""
    if not request.headers.get("content-type", "").lower().startswith(FORM):
        raise APIError(f"send a form with the file, with the header Content-Type: {FORM}")
    values: dict[str, Any] = {}
    file: tuple[str, bytes] | None = None
    async with request.form(max_files=1) as form:
        for key, value in form.multi_items():
            if isinstance(value, UploadFile) != (key == "file"):
                raise APIError("must be a file" if key == "file" else "must not be a file", param=key)
            if isinstance(value, UploadFile):
                file = (value.filename or "file", await value.read())
            elif key.startswith("expires_after[") and key.endswith("]"):
                values.setdefault("expires_after", {})[key.removeprefix("expires_after[")[:-1]] = value
            else:
                values[key] = value
    if file is None:
        raise APIError("is required", param="file")
    fields = validated(wire.FileForm, values)
    return file[0][:LONGEST_NAME].encode(errors="replace").decode(), file[1], fields
