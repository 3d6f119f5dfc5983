"""`python -m docs.check` (`make docs-check`): do what the guides say, in their order, in one folder, on tiny data.

Each page's files are written and its commands run as they stand there; blocks.py says how a block is marked. A `text`
block right behind a command holds lines of what it prints. At the end the metrics that the runs have logged are
compared with the reference. Takes some minutes, and the ports 8000 and 5000.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from docs import house
from docs.blocks import Block, blocks
from docs.reference import metrics

PAGES = Path(__file__).resolve().parent / "pages"
GUIDES = (
    "data",
    "pretraining",
    "stability",
    "scaling",
    "finetuning",
    "extending",
    "study",
    "measuring",
    "serving",
    "protection",
    "cluster",
    "watching",
    "failures",
)
PATIENCE = 1200.0  # seconds for one block, on a machine that has other work
PORTS = {8000: "serve", 5000: "show MLflow", 8010: "serve a study"}


class Failed(Exception):
    """What a guide says is not so; the message names the block and what happened."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "guides", nargs="*", choices=[*GUIDES, []], help="only these, in a folder where the others were done"
    )
    parser.add_argument("--workdir", type=Path, help="the folder, which stays; default: one that is removed")
    given = parser.parse_args()
    with _folder(given.workdir) as folder:
        variables = environment(folder)
        began = time.monotonic()
        try:
            _require_ports()
            if not given.guides:
                follow(PAGES / "how-it-works.md", folder, variables)
            for guide in given.guides or GUIDES:
                follow(PAGES / "guides" / f"{guide}.md", folder, variables)
            compare_metrics(folder)
        except Failed as failed:
            print(f"\n{failed}", file=sys.stderr)
            return 1
        finally:
            _run("calumma serve stop --now", folder, variables)
    print(f"every command did what its guide says, in {(time.monotonic() - began) / 60:.0f} min")
    return 0


def environment(folder: Path) -> dict[str, str]:
    """Variables of the commands: this environment's programs, nothing of the user's own servers and records."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "CALUMMA_", "RAY_"))
    }
    return variables | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "XDG_STATE_HOME": str(folder / ".state"),
        # what costs a small machine most when a cluster starts
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "COLUMNS": "200",
    }


def follow(page: Path, folder: Path, variables: Mapping[str, str]) -> None:
    """Everything that a page says to do. Raises Failed."""
    printed: str | None = None  # by the block before
    for block in blocks(page, PAGES):
        if block.language == "text":
            if printed is not None and block.follows:
                require_printed(block, printed)
            continue
        printed = None
        if block.elsewhere or block.part:
            continue
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.shell or block.language == "python":
            printed = perform(block, folder, variables)


def perform(block: Block, folder: Path, variables: Mapping[str, str]) -> str:
    """Run a block; what it prints. Raises Failed."""
    first = next(line for line in block.text.splitlines() if line.strip())
    print(f"{block.place:32} {first[:90]}", end="", flush=True)
    began = time.monotonic()
    if block.url:
        printed, code = _until(block, folder, variables), 0
    else:
        code, printed = _run(block.text, folder, variables, python=block.language == "python")
    print(f"  ({time.monotonic() - began:.0f} s)")
    if (code != 0) != (block.mark == "fails"):
        raise Failed(
            f"{block.place}: {'succeeds' if code == 0 else f'ends with code {code}'}:\n{block.text}\n{printed[-4000:]}"
        )
    return printed


def require_printed(block: Block, printed: str) -> None:
    """Each line of an output block is a part of what was printed; `…` stands for anything. Raises Failed."""
    there = _plain(printed)
    for line in filter(str.strip, block.text.splitlines()):
        wanted = ".*?".join(re.escape(_plain(part).strip()) for part in line.split("…"))
        if not re.search(wanted, there):
            raise Failed(f"{block.place}: nothing printed is like\n  {line}\nbut\n{printed[-4000:]}")


def compare_metrics(folder: Path) -> None:
    """The metrics of all runs in the folder's MLflow are in the reference. Raises Failed."""
    wrong = {job: found for job, names in house.logged_metrics(folder) if (found := metrics.unknown(job, names))}
    if wrong:
        raise Failed(f"docs/reference/metrics.py does not know these metrics of runs: {wrong}")


def _run(script: str, folder: Path, variables: Mapping[str, str], python: bool = False) -> tuple[int, str]:
    command = [sys.executable, "-c", script] if python else ["bash", "-eu", "-o", "pipefail", "-c", script]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            command, cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
        output.seek(0)
        return child.returncode, output.read()


def _until(block: Block, folder: Path, variables: Mapping[str, str]) -> str:
    """Run a command that stays, end it when its address answers. Raises Failed."""
    assert block.url is not None
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            ["bash", "-eu", "-c", block.text], cwd=folder, env=dict(variables), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
        answered = False
        while not answered and child.poll() is None and time.monotonic() < end:
            time.sleep(1)
            with suppress(OSError):
                urllib.request.urlopen(block.url, timeout=30).close()
                answered = True
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        output.seek(0)
        printed = output.read()
    if not answered:
        raise Failed(f"{block.place}: {block.url} never answers\n{printed[-4000:]}")
    return printed


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


def _require_ports() -> None:
    for port, what in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Failed(f"the guides {what} at port {port}, which something else has; stop it first") from error


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="calumma-guides-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
