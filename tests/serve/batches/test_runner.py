"""Every line of a batch is answered once, whatever is wrong with others and whenever the runner is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calumma.platform.storage import NotFound, StorageError, list_files
from calumma.serve.batches import runner
from calumma.serve.batches.lines import parse_lines
from calumma.serve.batches.records import BatchView, Order, new_number
from calumma.serve.batches.runner import Ask, BatchRunner, Reply
from calumma.serve.batches.store import OwnerStore, Store

PATIENCE = 300.0
ENDPOINT = "/v1/completions"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_WAIT", "LONGEST_WAIT", "REPORT_SECONDS"):
        monkeypatch.setattr(runner, name, 0.01)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "kept"))


def line(name: Any, **fields: Any) -> str:
    asked = {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": {"prompt": name}}
    return json.dumps(asked | fields)


def ordered(own: OwnerStore, lines: list[str], seconds: int = 3600) -> str:
    """A batch of these lines; its id."""
    file = own.add_file("in.jsonl", "\n".join(lines).encode(), "batch")
    now = int(time.time())
    order = Order(
        id=f"batch_{new_number()}",
        endpoint=ENDPOINT,
        input_file_id=file.id,
        completion_window="24h",
        created_at=now,
        expires_at=now + seconds,
    )
    return own.add_batch(order).order.id


def answers(own: OwnerStore, id: str | None) -> list[Any]:
    """What is in a file."""
    return [] if id is None else [json.loads(text) for text in b"".join(own.content(id)).splitlines()]


def until_ended(store: Store, own: OwnerStore, id: str, ask: Ask, most: int = 100) -> BatchView:
    async def run() -> BatchView:
        task = asyncio.create_task(BatchRunner(store, ask, 3, most, poll_seconds=0.01).run())
        try:
            async with asyncio.timeout(PATIENCE):
                while store.active():
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
        return own.batch(id)

    return asyncio.run(run())


async def echo(owner: str, path: str, body: bytes) -> Reply:
    return Reply(200, body, "req_1")


def test_a_bad_line_costs_itself_by_its_number(store: Store) -> None:
    own = store.of("anna")
    lines = [
        line("one"), "", "{", line("two"), "[]", line("one"), line("three", method="GET"), line("four", url="/v1/x"),
        line(7), line("five", body=[]), line("six", body={"stream": True}), line("\ud800"), "[" * 100_000,
        line("seven"),
    ]  # fmt: skip
    id = ordered(own, lines)
    asked: list[str] = []

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        assert (owner, path) == (own.folder, ENDPOINT)
        asked.append(json.loads(body)["prompt"])
        return Reply(400 if asked[-1] == "two" else 200, body, f"req_{len(asked)}")

    view = until_ended(store, own, id, ask)
    assert view.status == "completed"
    assert sorted(asked) == ["one", "seven", "two"]
    assert view.counts == {"total": 13, "completed": 2, "failed": 11}
    assert view.ended
    good = answers(own, view.ended.output_file_id)
    assert [(each["custom_id"], each["response"]["body"]) for each in good] == [
        ("one", {"prompt": "one"}),
        ("seven", {"prompt": "seven"}),
    ]
    bad = answers(own, view.ended.error_file_id)
    assert [each["error"]["message"].partition(":")[0] for each in bad if each["error"]] == [
        f"line {number}" for number in (3, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    ]
    assert [each["custom_id"] for each in bad] == [
        None, "two", None, "one", "three", "four", None, "five", "six", None, None,
    ]  # fmt: skip
    assert [each["response"]["status_code"] for each in bad if each["response"]] == [400]
    assert [error.line for error in view.ended.errors] == [3, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert len({each["id"] for each in good + bad}) == 13
    assert not [uri for uri in list_files(store.root) if "/answers/" in uri]


def test_a_busy_server_is_asked_again(store: Store) -> None:
    own = store.of(None)
    id = ordered(own, [line(f"{number}") for number in range(7)])
    tries: dict[bytes, int] = {}

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        tries[body] = tries.get(body, 0) + 1
        return Reply((429, 503, 200)[tries[body] - 1], body, "req")

    assert until_ended(store, own, id, ask).counts == {"total": 7, "completed": 7, "failed": 0}
    assert set(tries.values()) == {3}


@pytest.mark.parametrize("code", ["out_of_memory", "unavailable"])
def test_a_line_that_takes_memory_or_replicas_with_it_is_given_up(store: Store, code: str) -> None:
    own = store.of(None)
    id = ordered(own, [line("poison"), line("good")])
    asked = []

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        if json.loads(body)["prompt"] == "good":
            return Reply(200, body, "req")
        asked.append(path)
        return Reply(503, json.dumps({"error": {"code": code}}).encode(), "req")

    view = until_ended(store, own, id, ask)
    assert view.counts == {"total": 2, "completed": 1, "failed": 1}
    assert len(asked) == runner.MOST_TRIES[code]
    assert view.ended
    (bad,) = answers(own, view.ended.error_file_id)
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("poison", 503)


def test_storage_that_fails_for_a_moment_stops_no_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own = store.of(None)
    id = ordered(own, [line("slow")])
    failures, asked = [1, 2], []

    def cancelled(store: OwnerStore, id: str) -> bool:
        if failures:
            failures.pop()
            raise StorageError("away")
        return False

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        asked.append(body)
        while failures:
            await asyncio.sleep(0.01)
        return Reply(200, body, "req")

    monkeypatch.setattr(OwnerStore, "cancelled", cancelled)
    assert until_ended(store, own, id, ask).counts["completed"] == 1
    assert len(asked) == 1


def test_answers_stay_when_the_file_of_requests_goes(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    own = store.of(None)
    id = ordered(own, [line("first"), line("second")])

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        if json.loads(body)["prompt"] == "second":
            while not own.answered(id):
                await asyncio.sleep(0.01)
            own.delete_file(own.batch(id).order.input_file_id)
            raise StorageError("away")  # what it does with a batch then is begin it again
        return Reply(200, body, "req")

    view = until_ended(store, own, id, ask)
    assert (view.status, view.counts["completed"]) == ("failed", 1)
    assert view.ended
    assert [each["custom_id"] for each in answers(own, view.ended.output_file_id)] == ["first"]
    assert [error.code for error in view.ended.errors] == ["missing_file"]
    assert "Traceback" not in caplog.text


def test_no_more_are_asked_for_at_once_than_it_may_and_batches_take_turns(store: Store) -> None:
    batches = [(own := store.of(name), ordered(own, [line(f"{name}{k}") for k in range(9)])) for name in ("a", "b")]
    running, most, order = 0, 0, []

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        order.append(json.loads(body)["prompt"][0])
        await asyncio.sleep(0.01)
        running -= 1
        return Reply(200, body, "req")

    for own, id in batches:
        assert until_ended(store, own, id, ask).counts["completed"] == 9
    assert most == 3
    assert set(order[-4:]) == {"a", "b"}


@pytest.mark.parametrize("way", ["cancelled", "expired"])
def test_what_is_answered_stays_when_a_batch_is_ended_early(store: Store, way: str) -> None:
    own = store.of("anna")
    id = ordered(own, [line(f"{number}") for number in range(6)], seconds=2 if way == "expired" else 3600)

    async def ask(owner: str, path: str, body: bytes) -> Reply:
        if json.loads(body)["prompt"] in "01":
            return Reply(200, body, "req")
        if way == "cancelled":
            own.cancel(id)
        return await asyncio.get_running_loop().create_future()

    view = until_ended(store, own, id, ask)
    assert view.status == way
    assert view.ended
    assert sorted(each["custom_id"] for each in answers(own, view.ended.output_file_id)) == ["0", "1"]
    late = answers(own, view.ended.error_file_id)
    assert [each["error"]["code"] for each in late] == (["batch_expired"] * 4 if way == "expired" else [])
    assert own.cancel(id) == view, "it has ended"


def test_a_file_that_no_batch_can_have_fails_it(store: Store) -> None:
    own = store.of("anna")
    for lines, most, code in (([], 9, "empty_file"), ([line(f"{k}") for k in range(3)], 2, "too_many_requests")):
        view = until_ended(store, own, ordered(own, lines), echo, most)
        assert view.status == "failed"
        assert view.ended
        assert [error.code for error in view.ended.errors] == [code]
    id = ordered(own, [line("x")])
    own.delete_file(own.batch(id).order.input_file_id)
    assert until_ended(store, own, id, echo).status == "failed"


def test_owners_see_nothing_of_each_other(store: Store) -> None:
    anna, bert = store.of("anna"), store.of("..")
    file, id = anna.add_file("a", b"x", "batch"), ordered(anna, [line("x")])
    assert bert.file_ids() == bert.batch_ids() == []
    for look in (bert.file, bert.delete_file, lambda name: list(bert.content(name))):
        with pytest.raises(NotFound):
            look(file.id)
    for look_at in (bert.batch, bert.cancel):
        with pytest.raises(NotFound):
            look_at(id)
    for name in ("../../key-anna/files/" + file.id, f"{file.id}/../{file.id}", "", "file-x"):
        with pytest.raises(NotFound):
            anna.file(name)
    assert anna.file(file.id) == file
    assert anna.add_file("b", b"", "batch", seconds=0).id in anna.file_ids()
    with pytest.raises(NotFound, match="has expired"):
        anna.file(anna.file_ids()[0])


def test_lines_end_as_files_end_them() -> None:
    data = b"\xef\xbb\xbf" + "\r\n".join([line("a"), "", line("b")]).encode() + b"\r\n"
    assert [(each.number, each.custom_id, each.error) for each in parse_lines(data, ENDPOINT)] == [
        (1, "a", None),
        (3, "b", None),
    ]


Start = Callable[[int], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(store: Store, tmp_path: Path) -> Iterator[Start]:
    """A runner in a process of its own that asks for ever from so many on."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(hold: int) -> subprocess.Popen[bytes]:
        program = [sys.executable, str(Path(__file__).parent / "program.py"), store.root, str(tmp_path / "log")]
        processes.append(subprocess.Popen([*program, str(hold)]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_runner_that_is_killed_is_followed_by_one_that_asks_for_the_rest_alone(
    store: Store, start: Start, tmp_path: Path
) -> None:
    own, log = store.of("anna"), tmp_path / "log"
    names = [f"{number}" for number in range(10)]
    id = ordered(own, [line(name) for name in names])

    def until(done: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end
            time.sleep(0.02)

    def asked() -> list[str]:
        return log.read_text().split() if log.exists() else []

    whole: set[str] = set()
    for hold in (3, 4):  # killed twice, each time with answers given and two lines under way
        process, before = start(hold), len(asked())
        until(lambda: len(asked()) == before + hold + 1)  # noqa: B023
        until(lambda: len(own.answered(id)) == len(whole) + hold - 1)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert whole.isdisjoint(asked()[before:]), "what was answered is not asked again"
        whole |= {names[number - 1] for number in own.answered(id)}
    before = len(asked())
    start(99)
    until(lambda: own.batch(id).ended is not None)
    assert sorted(asked()[before:]) == sorted(set(names) - whole)
    view = own.batch(id)
    assert view.counts == {"total": 10, "completed": 10, "failed": 0}
    assert view.ended
    found = answers(own, view.ended.output_file_id)
    assert [each["custom_id"] for each in found] == names
    assert [each["response"]["body"]["text"] for each in found] == names
