"""What is kept of files and batches, as JSON in storage."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
FILE_ID = re.compile(r"file-[0-9a-f]{32}[oe]?")
BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


def new_number() -> str:
    """32 hexadecimal digits whose order is that of time."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


class Record(BaseModel):
    """Fields that a later version has are left out by an earlier one."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class FileRecord(Record):
    """expires_at: Unix time from which on it is not there."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None


class Order(Record):
    """A batch as it was asked for. output_seconds: after which the files of its answers expire."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] | None = None
    output_seconds: int | None = None


class Begun(Record):
    """total: lines."""

    in_progress_at: int
    total: int


class Progress(Record):
    completed: int = 0
    failed: int = 0


class LineError(Record):
    """line: its number in the input file, from 1; None: the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Ended(Record):
    """The last word on a batch."""

    status: Literal["failed", "completed", "expired", "cancelled"]
    at: int
    finalizing_at: int | None = None
    progress: Progress = Progress()
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()


class BatchView(Record):
    """All that is known of a batch."""

    order: Order
    begun: Begun | None = None
    progress: Progress = Progress()
    cancelling_at: int | None = None
    ended: Ended | None = None

    @property
    def status(self) -> Status:
        if self.ended is not None:
            return self.ended.status
        if self.cancelling_at is not None:
            return "cancelling"
        return "validating" if self.begun is None else "in_progress"

    @property
    def counts(self) -> dict[str, int]:
        now = self.progress if self.ended is None else self.ended.progress
        return {
            "total": 0 if self.begun is None else self.begun.total,
            "completed": now.completed,
            "failed": now.failed,
        }


Answer = dict[str, Any]  # a line of an output or error file
