"""Files and batches in storage. Each owner (an API key: its name and the beginning of its hash) has a folder, and sees
nothing else.

    OWNER/files/FILE.json, FILE.data            a file; it is there once its record is
    OWNER/batches/BATCH/order.json              what was asked
    OWNER/batches/BATCH/begun, progress, cancel, ended.json
    OWNER/batches/BATCH/answers/LINE-ok.json    one object for each line that is answered, LINE-bad.json where it failed
    active/OWNER/BATCH                          batches that are not ended

All of a batch that must survive a crash is one of these objects, written whole: who goes on with it starts from them.
Functions block; raise StorageError, and NotFound on what is not there or belongs to somebody else.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from calumma.platform.storage import (
    NotFound,
    delete,
    exists,
    join,
    list_files,
    open_read,
    read_bytes,
    sizes,
    upload,
    write_bytes,
)
from calumma.serve.batches.records import (
    BATCH_ID,
    FILE_ID,
    Answer,
    BatchView,
    Begun,
    Ended,
    FileRecord,
    Order,
    Progress,
    Record,
    new_number,
)

R = TypeVar("R", bound=Record)
EVERYBODY = "everybody"  # the owner where no keys are needed
CHUNK = 1 << 20
READERS, TOGETHER = 16, 256  # threads that read answers, and answers in memory at once
ANSWER = re.compile(r"(\d+)-(ok|bad)\.json$")


class Store:
    """root: a folder or s3://… location."""

    def __init__(self, root: str) -> None:
        self.root = root

    def of(self, owner: str | None) -> OwnerStore:
        """owner: a key's (APIKey.owner); None: where none are needed."""
        return OwnerStore(self.root, EVERYBODY if owner is None else f"key-{owner}")

    def active(self) -> list[tuple[OwnerStore, str]]:
        """Batches that are not ended, the oldest first: whose, and the id."""
        found = [uri.rsplit("/", 2)[1:] for uri in list_files(join(self.root, "active"))]
        return [
            (OwnerStore(self.root, folder), id)
            for folder, id in sorted(found, key=lambda each: each[1])
            if BATCH_ID.fullmatch(id)
        ]


class OwnerStore:
    def __init__(self, root: str, folder: str) -> None:
        self.folder = folder
        self._root = root
        self._files = join(root, folder, "files")
        self._batches = join(root, folder, "batches")

    # ---- files

    def add_file(self, name: str, data: bytes, purpose: str, seconds: int | None = None) -> FileRecord:
        """seconds: after which it expires."""
        now = int(time.time())
        expires = None if seconds is None else now + seconds
        id = f"file-{new_number()}"
        write_bytes(self._data(id), data)
        return self._record_file(
            FileRecord(id=id, bytes=len(data), created_at=now, filename=name, purpose=purpose, expires_at=expires)
        )

    def file(self, id: str) -> FileRecord:
        record = self._read(join(self._files, f"{_checked(id, FILE_ID)}.json"), FileRecord)
        if record.expires_at is not None and record.expires_at <= time.time():
            self.delete_file(id)
            raise NotFound(f"the file {id} has expired")
        return record

    def content(self, id: str) -> Iterator[bytes]:
        """In chunks."""
        self.file(id)
        with open_read(self._data(id)) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def delete_file(self, id: str) -> None:
        record = join(self._files, f"{_checked(id, FILE_ID)}.json")
        if not exists(record):
            raise NotFound(f"there is no file {id}")
        delete(record)
        delete(self._data(id))

    def file_ids(self) -> list[str]:
        """The newest first."""
        return self._ids(self._files, FILE_ID, ".json")

    def _data(self, id: str) -> str:
        return join(self._files, f"{id}.data")

    def _record_file(self, record: FileRecord) -> FileRecord:
        write_bytes(join(self._files, f"{record.id}.json"), record.model_dump_json().encode())
        return record

    # ---- batches

    def add_batch(self, order: Order) -> BatchView:
        write_bytes(join(self._root, "active", self.folder, order.id), b"")  # without its order it is passed over
        self._write(order.id, "order", order)
        return BatchView(order=order)

    def batch(self, id: str) -> BatchView:
        _checked(id, BATCH_ID)
        view = BatchView(
            order=self._read(self._part(id, "order"), Order),
            begun=self._find(id, "begun", Begun),
            progress=self._find(id, "progress", Progress) or Progress(),
            ended=self._find(id, "ended", Ended),
        )
        if view.ended is None and exists(self._part(id, "cancel")):
            asked = json.loads(read_bytes(self._part(id, "cancel")))
            return view.model_copy(update={"cancelling_at": asked["at"]})
        return view

    def batch_ids(self) -> list[str]:
        """The newest first."""
        return self._ids(self._batches, BATCH_ID, "/order.json")

    def cancel(self, id: str) -> BatchView:
        """Nothing happens to one that has ended."""
        if self.batch(id).ended is None:
            write_bytes(self._part(id, "cancel"), json.dumps({"at": int(time.time())}).encode())
        return self.batch(id)

    def cancelled(self, id: str) -> bool:
        return exists(self._part(id, "cancel"))

    # ---- for whoever answers

    def begin(self, id: str, begun: Begun) -> None:
        self._write(id, "begun", begun)

    def report(self, id: str, progress: Progress) -> None:
        self._write(id, "progress", progress)

    def answered(self, id: str) -> dict[int, bool]:
        """The lines that are answered; whether it went well."""
        found = (ANSWER.search(uri) for uri in list_files(join(self._batches, id, "answers")))
        return {int(match[1]): match[2] == "ok" for match in found if match}

    def write_answer(self, id: str, line: int, well: bool, answer: Answer) -> None:
        write_bytes(self._answer(id, line, well), json.dumps(answer, ensure_ascii=False).encode())

    def write_output(self, order: Order, lines: Iterable[int], well: bool) -> str | None:
        """A file of the answers of these lines; None where there are none. Written again, it is the same file."""
        id = order.id
        lines = sorted(lines)
        if not lines:
            return None
        what = "output" if well else "errors"
        name = f"file-{id.removeprefix('batch_')}{'o' if well else 'e'}"
        size = 0
        with tempfile.NamedTemporaryFile(prefix="calumma-") as file:
            with ThreadPoolExecutor(READERS) as pool:
                for begin in range(0, len(lines), TOGETHER):
                    answers = [self._answer(id, line, well) for line in lines[begin : begin + TOGETHER]]
                    for answer in pool.map(read_bytes, answers):
                        size += file.write(answer + b"\n")
            file.flush()
            upload(Path(file.name), self._data(name))
        now = int(time.time())
        record = FileRecord(
            id=name,
            bytes=size,
            created_at=now,
            filename=f"{id}_{what}.jsonl",
            purpose="batch_output",
            expires_at=None if order.output_seconds is None else now + order.output_seconds,
        )
        return self._record_file(record).id

    def end(self, id: str, ended: Ended) -> None:
        self._write(id, "ended", ended)
        self.forget(id)

    def forget(self, id: str) -> None:
        """Of a batch that has ended, what only its answering needed."""
        delete(join(self._batches, id, "answers"))
        delete(join(self._root, "active", self.folder, id))

    def _answer(self, id: str, line: int, well: bool) -> str:
        return join(self._batches, id, "answers", f"{line:08d}-{'ok' if well else 'bad'}.json")

    def _part(self, id: str, part: str) -> str:
        return join(self._batches, id, f"{part}.json")

    def _write(self, id: str, part: str, record: Record) -> None:
        write_bytes(self._part(id, part), record.model_dump_json().encode())

    def _find(self, id: str, part: str, kind: type[R]) -> R | None:
        try:
            return self._read(self._part(id, part), kind)
        except NotFound:
            return None

    def _read(self, uri: str, kind: type[R]) -> R:
        return kind.model_validate_json(read_bytes(uri))

    def _ids(self, folder: str, form: re.Pattern[str], end: str) -> list[str]:
        names = (uri.removesuffix(end).rsplit("/", 1)[-1] for uri in sizes(folder) if uri.endswith(end))
        return sorted((name for name in names if form.fullmatch(name)), reverse=True)


def _checked(id: str, form: re.Pattern[str]) -> str:
    if not form.fullmatch(id):
        raise NotFound(f"there is no {id!r} here")
    return id
