"""A worker that hangs is ended, and its stack traces are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from calumma.platform.training.group import entry, watchdog


def hung_process(tmp_path: Path, wait: str) -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that beats once and then waits for ever, in the given way."""
    script = f"""
import ctypes, pathlib, threading, time
from calumma.platform.training.group.watchdog import Watchdog

def keep(text):
    pathlib.Path("stacks.txt").write_text(text)

dog = Watchdog(1.0, keep, grace=0.1)

def waiting_for_a_neighbour():
    {wait}

for _ in range(4):
    time.sleep(0.5)
    dog.beat()
print("alive", flush=True)
waiting_for_a_neighbour()
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_a_worker_without_progress_is_ended_and_its_stacks_are_kept(tmp_path: Path) -> None:
    ended = hung_process(tmp_path, "threading.Event().wait()")
    assert ended.returncode == watchdog.HUNG_EXIT_CODE
    assert ended.stdout == "alive\n"  # as long as it beat, it lived
    stacks = (tmp_path / "stacks.txt").read_text()
    assert stacks.startswith("no progress for")
    assert "in waiting_for_a_neighbour" in stacks
    assert "'MainThread'" in stacks


def test_even_where_no_python_thread_can_run_the_worker_ends_and_its_stacks_are_kept(tmp_path: Path) -> None:
    ended = hung_process(tmp_path, "ctypes.PyDLL(None).sleep(600)")  # C code that never gives the interpreter back
    assert ended.returncode == 1
    (file,) = tmp_path.glob("calumma-stacks-*.txt")
    assert "in waiting_for_a_neighbour" in file.read_text()


def test_a_worker_is_watched_from_its_first_import_on(tmp_path: Path) -> None:
    """What reads the loop hangs, as an import from a disk that does not answer would."""
    script = f"""
import sys
from calumma.platform.training.group import entry, watchdog

watchdog._GRACE = 0.1

class Hangs:
    def __reduce__(self):
        return exec, ("import threading; threading.Event().wait()",)

import pickle
print('torch' in sys.modules, 'deepspeed' in sys.modules, flush=True)
entry.run_packed(pickle.dumps(Hangs()), b"", 1.0, {str(tmp_path / "stacks")!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == watchdog.HUNG_EXIT_CODE, ended.stderr
    assert ended.stdout == "False False\n"
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.endswith("-importing-worker-00000.txt")
    assert "no progress for" in file.read_text().splitlines()[0]


def test_a_loop_gets_the_watchdog_that_watches_it(tmp_path: Path) -> None:
    run = entry.watched(_told, 60, str(tmp_path))
    assert run({"payload": entry.packed({"number": 7})}) == (7, "starting")


def _told(config: dict[str, Any]) -> tuple[int, str]:
    return config["number"], config[entry.WATCHDOG].place
