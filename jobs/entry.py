"""Entry points of jobs, `python -m calumma.jobs.NAME`; exit codes and error messages of commands."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS, job_function
from calumma.platform.cluster.progress import LogLines
from calumma.platform.cluster.runner import run_on_own_cluster
from calumma.platform.specification import JobSpecification, SpecificationError

FAILED = 1
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def job_specification(job: str, file: str | Path, overrides: Sequence[str] = ()) -> JobSpecification:
    """The specification of a named job from its file. Raises SpecificationError for an unknown name or a bad file."""
    if job not in JOBS:
        raise SpecificationError(f"there is no job {job!r}; jobs are: {', '.join(JOBS)}")
    return read_specification(JOBS[job], file, list(overrides))


def user_message(error: BaseException) -> str | None:
    """What to tell the user about an error; None for a bug, which deserves its traceback.

    The exceptions that calumma defines are written for the user. They may arrive wrapped by Ray, from a worker.
    """
    for inner in _error_chain(error):
        if type(inner).__module__.partition(".")[0] == "calumma":
            return str(inner)
    return None


def _error_chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those it wraps: causes, Ray's task errors, Ray Train's failures of workers and controller."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        inner = waiting.pop(0)
        if not isinstance(inner, BaseException) or id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        waiting += [getattr(inner, name, None) for name in ("cause", "_base_exc", "controller_failure", "__cause__")]
        failures = getattr(inner, "worker_failures", None)
        waiting += list(failures.values()) if isinstance(failures, dict) else []


def exit_code_of(body: Callable[[], None], resume_command: str, show: Callable[[str], None]) -> int:
    """Run a command's body; its exit code. What went wrong is shown to the user.

    0 when all went well, 1 after an error, 130 after Ctrl-C. `resume_command` is told to the user after Ctrl-C.
    """
    try:
        body()
    except KeyboardInterrupt:
        show(f"Stopped. Nothing half-finished was published; resume by the same command: {resume_command}")
        return INTERRUPTED
    except Exception as error:
        text = user_message(error)
        if text is None:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        show(text)
        return FAILED
    return 0


def main(job: str, arguments: Sequence[str] | None = None) -> int:
    """`python -m calumma.jobs.NAME --config FILE [--set a.b=c]… [--address ADDRESS] [--force]`: the exit code.

    Runs on the cluster that $RAY_ADDRESS names, as it does for submitted jobs, or else on an embedded one.
    """
    parser = argparse.ArgumentParser(prog=f"python -m calumma.jobs.{job}", description=JOBS[job].__doc__)
    parser.add_argument("--config", required=True, type=Path, help="the specification, a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override one field; repeats")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="a running cluster; default: embedded")
    parser.add_argument("--force", action="store_true", help="run again even if the result stands")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def body() -> None:
        spec = job_specification(job, options.config, options.set)
        manifest, skipped = run_on_own_cluster(spec, job_function(job), LogLines(job), options.force, options.address)
        print_status(f"{job}: {'already done' if skipped else 'done'}: {spec.output_uri} ({len(manifest.files)} files)")

    words = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code_of(body, shlex.join(["python", "-m", f"calumma.jobs.{job}", *words]), print_status)


def print_status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
