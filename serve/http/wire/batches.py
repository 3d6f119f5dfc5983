"""OpenAI's Files and Batch APIs as types.

Reference: platform.openai.com/docs/api-reference/files and …/batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from calumma.serve.batches.records import BatchView, FileRecord, Status
from calumma.serve.http.wire.content import RequestModel, WireModel
from calumma.serve.http.wire.errors import APIError

HOUR, DAY = 3600, 24 * 3600


class ExpiresAfter(RequestModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=HOUR, le=30 * DAY)


class FileForm(RequestModel):
    """The fields of the form beside the file."""

    purpose: Literal["batch"] = Field(description="what it is for")
    expires_after: ExpiresAfter | None = Field(None, description="when it is deleted; none: never")


class FileObject(WireModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, record: FileRecord) -> FileObject:
        return cls(**record.model_dump())


class DeletedFile(WireModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ObjectList(WireModel):
    """A page of objects that have ids."""

    object: Literal["list"] = "list"
    data: list[Any]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[Any], has_more: bool) -> Self:
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)


class FileList(ObjectList):
    data: list[FileObject]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class BatchRequest(RequestModel):
    input_file_id: str = Field(description="a file with purpose `batch`: a request a line")
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/images/generations"] = Field(
        description="where all its requests go"
    )
    completion_window: Literal["24h"] = Field(description="what is not answered by then expires")
    metadata: Metadata | None = Field(None, description="comes back with the batch")
    output_expires_after: ExpiresAfter | None = Field(None, description="when the files of its answers are deleted")

    @model_validator(mode="after")
    def _writable(self) -> BatchRequest:
        try:
            self.model_dump_json().encode()
        except ValueError as error:
            raise APIError(f"the request cannot be written as JSON: {error}", code="invalid_value") from error
        return self


class BatchError(WireModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(WireModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(WireModel):
    total: int
    completed: int
    failed: int


class BatchObject(WireModel):
    """`errors`: of the file, or of lines that are no requests, by their number; the first hundred."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None

    @classmethod
    def of(cls, view: BatchView) -> BatchObject:
        fields: dict[str, Any] = view.order.model_dump(exclude={"output_seconds"})
        if view.begun is not None:
            fields["in_progress_at"] = view.begun.in_progress_at
        fields["cancelling_at"] = view.cancelling_at
        if (ended := view.ended) is not None:
            fields |= ended.model_dump(include={"finalizing_at", "output_file_id", "error_file_id"})
            fields[f"{ended.status}_at"] = ended.at
            if ended.errors:
                fields["errors"] = BatchErrors(data=[BatchError(**error.model_dump()) for error in ended.errors])
        return cls(status=view.status, request_counts=RequestCounts(**view.counts), **fields)


class BatchList(ObjectList):
    data: list[BatchObject]


T = TypeVar("T")


def page(ids: Sequence[str], after: str | None, limit: int, read: Callable[[str], T | None]) -> tuple[list[T], bool]:
    """The values behind so many of the ids that follow `after`, and whether there are more. Those that are gone (None)
    are left out. Raises APIError."""
    begin = 0
    if after is not None:
        if after not in ids:
            raise APIError(f"there is no {after[:80]!r} to go on from", param="after", code="invalid_value")
        begin = ids.index(after) + 1
    found: list[T] = []
    for number, id in enumerate(ids[begin:], start=begin):
        if len(found) == limit:
            return found, number < len(ids)
        if (value := read(id)) is not None:
            found.append(value)
    return found, False
