"""A worker that hangs is ended, and its stack traces are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from calumma.platform.training.group import watchdog


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
