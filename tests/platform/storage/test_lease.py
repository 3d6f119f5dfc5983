"""One owner for an output, with real second processes that are killed, stopped and woken up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from calumma.platform import storage
from calumma.platform.storage import lease
from calumma.platform.storage.lease import Lease, OutputTaken

SECONDS = 1.5
# A run that has an output, writes its name into it again and again, each time after looking whether it may, and says
# how it ended.
RUN = """
import sys, time
from calumma.platform import storage
from calumma.platform.storage import lease
output, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
try:
    with lease.held(output, seconds) as owned:
        owned.tell(name)
        print("has it", flush=True)
        while True:
            owned.fence.check()
            storage.write_bytes(storage.join(output, "by"), name.encode())
            time.sleep(0.01)
except lease.OutputTaken as taken:
    print(f"refused: {taken}", flush=True)
"""


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return storage.join(root, "stages/one")


@contextmanager
def another_run(output: str, name: str, seconds: float = SECONDS) -> Iterator[subprocess.Popen[str]]:
    """A run in another process, once it has the output."""
    command = [sys.executable, "-c", RUN, output, name, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners are on other machines: their processes cannot be looked for."""
    monkeypatch.setattr(lease, "_machine", lambda: "another")


def test_a_second_run_is_refused_and_told_who_has_the_output(output: str) -> None:
    with another_run(output, "run-1") as first:
        began = time.monotonic()
        with pytest.raises(OutputTaken) as refused:
            lease.acquire(output)
        assert time.monotonic() - began < lease.SECONDS / 2, "it waited although the owner's process lives"
        for told in (output, "the run run-1", f"process {first.pid}", os.uname().nodename, "started 20"):
            assert told in str(refused.value)
        assert first.poll() is None


def test_a_run_that_was_killed_leaves_its_output_to_the_next_at_once(output: str) -> None:
    with another_run(output, "run-1", seconds=1e6) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # its remains stay in the list of processes
        with lease.held(output, SECONDS) as second:
            assert second.fence.epoch == 2
    assert [Path(uri).name for uri in storage.list_files(f"{output}.lease")] == ["00000002.json"]


def test_a_run_on_another_machine_is_watched_whether_it_lives(output: str, elsewhere: None) -> None:
    with another_run(output, "run-1", seconds=3.0) as first:
        with pytest.raises(OutputTaken, match="run-1"):
            lease.acquire(output)
        os.kill(first.pid, signal.SIGKILL)
        with lease.held(output, SECONDS) as second:
            assert second.fence.epoch == 2


def test_a_run_that_was_stopped_and_wakes_up_writes_no_more(output: str, elsewhere: None) -> None:
    """At any moment of its writes; whoever has the output now has it alone."""
    for turn in range(2):
        with another_run(output, f"old-{turn}") as old:
            time.sleep(0.003 * turn)
            os.kill(old.pid, signal.SIGSTOP)
            with lease.held(output, 1e6) as now:
                os.kill(old.pid, signal.SIGCONT)
                assert old.stdout is not None
                said = old.stdout.readline()
                assert said.startswith("refused: ")
                assert f"process {os.getpid()}" in said
                assert old.wait() == 0
                now.fence.check()
                storage.write_bytes(storage.join(output, "by"), b"now")
            assert storage.read_bytes(storage.join(output, "by")) == b"now"


def test_the_one_who_lost_it_is_interrupted(tmp_path: Path) -> None:
    """Whatever it waits for, as by Ctrl-C."""
    output = str(tmp_path / "one")

    def lose_it() -> None:
        with lease.held(output, SECONDS):
            storage.create(f"{output}.lease/00000009.json", lease.Owner.here(60).model_dump_json().encode())
            time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in several processes ignore
    try:
        with pytest.raises(OutputTaken, match="belongs to another run"):
            lose_it()
    finally:
        signal.signal(signal.SIGINT, before)
    assert Path(f"{output}.lease/00000009.json").exists()


def test_of_many_that_start_together_one_alone_has_the_output(output: str) -> None:
    def start(number: int) -> Lease | None:
        try:
            return lease.acquire(output)
        except OutputTaken:
            return None

    with ThreadPoolExecutor(8) as pool, ExitStack() as ends:
        found = [owned for owned in pool.map(start, range(8)) if owned is not None]
        for owned in found:
            ends.callback(owned.release)
        assert [owned.fence.epoch for owned in found] == [1]


def test_a_released_output_is_free_and_its_numbers_go_on(output: str) -> None:
    for number in (1, 2, 3):
        with lease.held(output) as owned:
            assert owned.fence.epoch == number
            storage.write_bytes(storage.join(output, "file"), b"")
            storage.delete(output)  # the lease is not in it
            owned.fence.check()


def test_a_storage_that_is_away_for_a_while_costs_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "one")
    with lease.held(output, 0.3) as owned:
        with monkeypatch.context() as broken:
            broken.setattr(storage, "write_bytes", _away)
            time.sleep(0.5)
        time.sleep(0.2)
        assert owned.lost is None
        with pytest.raises(OutputTaken):
            lease.acquire(output)


def _away(uri: str, data: bytes) -> None:
    raise storage.StorageError(f"cannot write {uri}: the endpoint does not answer")
