"""Answers batches, at spare capacity.

- A line is answered when its answer is in storage. Whoever goes on after a crash asks for the others alone; those that
  were being asked for when it came are asked for again.
- Each line has one answer: the object that holds it has the line's number for a name.
- So many lines are asked for at once, those of all batches together; batches take turns.
- An answer that says that the server is busy (429, 503) is none: the line is asked for again later. One that may be
  the line's own fault, as it took memory or replicas with it, is asked for again a few times only.
- One runner is at work at a time; two would ask twice, and still write each answer once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from calumma.platform.storage import NotFound, StorageError
from calumma.serve.batches.lines import Line, parse_lines
from calumma.serve.batches.records import Answer, BatchView, Begun, Ended, LineError, Progress
from calumma.serve.batches.store import OwnerStore, Store
from calumma.serve.protocol import OUT_OF_MEMORY, UNAVAILABLE

log = logging.getLogger(__name__)

BUSY = (429, 503)
MOST_TRIES = {OUT_OF_MEMORY: 3, UNAVAILABLE: 20}  # by the code of the error; of a replica that is starting, minutes
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds until a line is asked for again
REPORT_SECONDS = 1.0  # between reports of a batch's progress, and looks whether it is cancelled
MOST_ERRORS = 100  # of lines, told by a batch itself; all are in its error file


@dataclass(frozen=True)
class Reply:
    """status: HTTP's. body: JSON. id: of the request."""

    status: int
    body: bytes
    id: str


# (whose batch, endpoint, the request's body) -> what the endpoint answers
Ask = Callable[[str, str, bytes], Awaitable[Reply]]


@dataclass
class _Work:
    """A batch at work."""

    store: OwnerStore
    view: BatchView
    answered: dict[int, bool]
    errors: list[LineError] = field(default_factory=list)
    writes: set[asyncio.Task[None]] = field(default_factory=set)  # of answers, under way

    @property
    def id(self) -> str:
        return self.view.order.id

    @property
    def progress(self) -> Progress:
        completed = sum(self.answered.values())
        return Progress(completed=completed, failed=len(self.answered) - completed)


class BatchRunner:
    def __init__(self, store: Store, ask: Ask, concurrency: int, most_lines: int, poll_seconds: float = 2.0) -> None:
        """concurrency: lines asked for at once. most_lines: of a batch. poll_seconds: between looks for new batches."""
        self._store, self._ask = store, ask
        self._concurrency, self._most_lines, self._poll = concurrency, most_lines, poll_seconds
        self._places = asyncio.Semaphore(concurrency)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                try:
                    for store, id in await asyncio.to_thread(self._store.active):
                        if id not in self._tasks:
                            self._tasks[id] = asyncio.create_task(self._answer(store, id))
                except StorageError as error:
                    log.warning("batches cannot be looked for: %s", error)
                await asyncio.sleep(self._poll)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, store: OwnerStore, id: str) -> None:
        """One batch. What goes wrong here, but for the batch's own faults, is tried again at the next look."""
        try:
            view = await asyncio.to_thread(store.batch, id)
            if view.ended is not None:
                await asyncio.to_thread(store.forget, id)
                return
            work = _Work(store, view, await asyncio.to_thread(store.answered, id))
            lines = await self._lines(work)
            if isinstance(lines, LineError) and view.begun is not None:  # the file went: what is answered stays
                work.errors = [lines]
                await self._end(work, "failed")
                return
            if isinstance(lines, LineError):
                ended = Ended(status="failed", at=int(time.time()), errors=(lines,))
                await asyncio.to_thread(store.end, id, ended)
                return
            if view.begun is None:
                begun = Begun(in_progress_at=int(time.time()), total=len(lines))
                await asyncio.to_thread(store.begin, id, begun)
            await self._answer_lines(work, lines)
        except NotFound:  # its order is not written yet
            return
        except StorageError as error:
            log.warning("%s is left for now: %s", id, error)
        except Exception:
            log.exception("%s is left for now", id)
        finally:
            self._tasks.pop(id, None)

    async def _lines(self, work: _Work) -> list[Line] | LineError:
        order = work.view.order

        def read() -> list[Line] | LineError:
            try:
                data = b"".join(work.store.content(order.input_file_id))
            except NotFound:
                return LineError(code="missing_file", message=f"the file {order.input_file_id} is not there any more")
            lines = list(parse_lines(data, order.endpoint))
            if not lines:
                return LineError(code="empty_file", message=f"the file {order.input_file_id} has no requests")
            if len(lines) > self._most_lines:
                message = f"a batch may have {self._most_lines} requests here; this one has {len(lines)}"
                return LineError(code="too_many_requests", message=message)
            return lines

        return await asyncio.to_thread(read)

    async def _answer_lines(self, work: _Work, lines: list[Line]) -> None:
        work.errors = [line.error for line in lines if line.error is not None]
        left = [line for line in lines if line.number not in work.answered]
        watch = asyncio.create_task(self._watch(work))
        asking = asyncio.create_task(self._ask_all(work, left))
        try:
            await asyncio.wait({watch, asking}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()  # which raises
                await self._end(work, "completed")
                return
            status = watch.result()
        finally:
            for task in (watch, asking):
                task.cancel()
            await asyncio.gather(watch, asking, return_exceptions=True)
            await asyncio.gather(*work.writes, return_exceptions=True)
        if status == "expired":
            error = LineError(code="batch_expired", message="the completion window ended before it was answered")
            for line in left:
                if line.number not in work.answered:
                    await self._write(work, line, False, _answer_of(work.id, line, error=line.error or error))
        await self._end(work, status)

    async def _watch(self, work: _Work) -> Any:
        """Reports progress; returns "cancelled" or "expired" when the batch is."""
        told: Progress | None = None
        while True:
            try:
                if await asyncio.to_thread(work.store.cancelled, work.id):
                    return "cancelled"
                if work.progress != told:
                    await asyncio.to_thread(work.store.report, work.id, progress := work.progress)
                    told = progress
            except StorageError as error:  # answers that are under way are worth more than a report of them
                log.warning("%s: its progress cannot be reported: %s", work.id, error)
            if time.time() >= work.view.order.expires_at:
                return "expired"
            await asyncio.sleep(REPORT_SECONDS)

    async def _ask_all(self, work: _Work, lines: Iterable[Line]) -> None:
        """Not more than `concurrency` of them under way or waiting for a place, so that batches take turns."""
        own = asyncio.Semaphore(self._concurrency)

        async def one(line: Line) -> None:
            try:
                await self._ask_one(work, line)
            finally:
                own.release()

        try:
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    await own.acquire()
                    group.create_task(one(line))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from failed

    async def _ask_one(self, work: _Work, line: Line) -> None:
        if line.error is not None:
            await self._write(work, line, False, _answer_of(work.id, line, error=line.error))
            return
        wait, tries = FIRST_WAIT, 0
        while True:
            async with self._places:
                reply = await self._ask(work.store.folder, work.view.order.endpoint, line.body)
            tries += 1
            if reply.status not in BUSY or tries >= MOST_TRIES.get(_code(reply), math.inf):
                break
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
        await self._write(work, line, reply.status == 200, _answer_of(work.id, line, reply))

    async def _write(self, work: _Work, line: Line, well: bool, answer: Answer) -> None:
        """What has begun is finished, even if the batch is ended meanwhile: an answer is there and counted, or not."""

        async def write() -> None:
            await asyncio.to_thread(work.store.write_answer, work.id, line.number, well, answer)
            work.answered[line.number] = well

        task = asyncio.create_task(write())
        work.writes.add(task)
        task.add_done_callback(work.writes.discard)
        await asyncio.shield(task)

    async def _end(self, work: _Work, status: Any) -> None:
        finalizing = int(time.time())

        def write() -> None:
            files: dict[bool, str | None] = {}
            for well in True, False:
                lines = [number for number, found in work.answered.items() if found == well]
                files[well] = work.store.write_output(work.view.order, lines, well)
            ended = Ended(
                status=status,
                at=int(time.time()),
                finalizing_at=finalizing,
                progress=work.progress,
                output_file_id=files[True],
                error_file_id=files[False],
                errors=tuple(work.errors[:MOST_ERRORS]),
            )
            work.store.end(work.id, ended)

        await asyncio.to_thread(write)


def _code(reply: Reply) -> str:
    """Of an error object; empty where there is none."""
    try:
        return str(json.loads(reply.body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return ""


def _answer_of(batch: str, line: Line, reply: Reply | None = None, error: LineError | None = None) -> Answer:
    """A line of an output or error file, as OpenAI writes it."""
    number = hashlib.sha256(f"{batch} {line.number}".encode()).hexdigest()[:32]
    response = None
    if reply is not None:
        response = {"status_code": reply.status, "request_id": reply.id, "body": json.loads(reply.body)}
    return {
        "id": f"batch_req_{number}",
        "custom_id": line.custom_id,
        "response": response,
        "error": None if error is None else {"code": error.code, "message": error.message},
    }
