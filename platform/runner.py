"""Runs one job: skip it when its result stands, check what it asks for, track it, call it; and `main` for job files.

A job file `jobs/NAME.py` has `run(specification, run, progress) -> Manifest`; everything around that call is here.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from calumma.platform import cluster
from calumma.platform.config import JOBS, ImageTokenizerSpecification, JobSpecification, SpecificationError, read
from calumma.platform.progress import LogLines, Progress, silent

if TYPE_CHECKING:
    from calumma.platform.data.manifest import Manifest

FAILED = 1
CHECKPOINTS = "checkpoints"  # folder of a training stage's output
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def specification(job: str, file: str | Path, overrides: Sequence[str] = ()) -> JobSpecification:
    """The specification of a named job from its file. Raises SpecificationError for an unknown name or a bad file."""
    if job not in JOBS:
        raise SpecificationError(f"there is no job {job!r}; jobs are: {', '.join(JOBS)}")
    return read(JOBS[job], file, list(overrides))


def output_of(spec: JobSpecification) -> str:
    """Where a job's result and manifest are."""
    return spec.locate(str(spec.model_dump()["output"]))


def standing(spec: JobSpecification) -> Manifest | None:
    """The manifest of an equal specification's finished result, if there is one with its files all there.

    One listing tells; contents are not read. Raises as `finished`.
    """
    from calumma.platform.data.manifest import ManifestError, finished

    place = output_of(spec)
    manifest = finished(place, spec)
    try:
        if manifest is not None:
            manifest.verify(place)
    except ManifestError:
        return None
    return manifest


def discard(spec: JobSpecification) -> None:
    """Take away what a job has made so far (its manifest, the files that names, its checkpoints) and nothing else."""
    from calumma.platform import storage
    from calumma.platform.data import receipts
    from calumma.platform.data.manifest import MANIFEST, Manifest

    place = output_of(spec)
    manifest = Manifest.find(place)
    for path in [MANIFEST, *(entry.path for entry in manifest.files)] if manifest else []:
        storage.delete(storage.join(place, path))
    for folder in (CHECKPOINTS, receipts.FOLDER):
        storage.delete(storage.join(place, folder))
    if isinstance(spec, ImageTokenizerSpecification):
        storage.delete(storage.join(spec.training, CHECKPOINTS))


def run_job(spec: JobSpecification, progress: Progress = silent, force: bool = False) -> tuple[Manifest, bool]:
    """Run a job on the cluster this process is connected to (see calumma.platform.cluster).

    Returns its manifest, and whether it was skipped because an equal specification's result stands already; `force`
    first discards that result and any checkpoints to resume from. Raises SpecificationError, before anything is
    tracked, when the cluster lacks what the job asks for. An exception of the job marks its MLflow run as failed and
    goes on to the caller.
    """
    if not force and (done := standing(spec)) is not None:
        return done, True
    cluster.require(spec.resources)
    if force:
        discard(spec)
    job = importlib.import_module(f"calumma.jobs.{spec.job}")

    from calumma.platform import tracking

    with tracking.run(spec) as run:
        manifest: Manifest = job.run(spec, run, progress)
    return manifest, False


def run_alone(
    spec: JobSpecification,
    progress: Progress = silent,
    force: bool = False,
    address: str | None = None,
    logs: Path | None = None,
) -> tuple[Manifest, bool]:
    """`run_job` with a cluster for it alone: embedded in this process, or the one at `address`; none for 0 workers.

    What needs no cluster to find out (result stands, machine too small) is found out before one is started.
    """
    if not force and (done := standing(spec)) is not None:
        return done, True
    if address is None:
        cluster.require(spec.resources)
    if address:
        place: AbstractContextManager[object] = cluster.connected(address)
    else:
        place = cluster.embedded(logs=logs) if spec.resources.max_workers else nullcontext()
    with place:
        return run_job(spec, progress, force)


def message(error: BaseException) -> str | None:
    """What to tell the user about an error; None for a bug, which deserves its traceback.

    The exceptions that calumma defines are written for the user. They may arrive wrapped by Ray, from a worker.
    """
    for inner in _inside(error):
        if type(inner).__module__.partition(".")[0] == "calumma":
            return str(inner)
    return None


def _inside(error: BaseException) -> Iterator[BaseException]:
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


def guarded(act: Callable[[], None], again: str, tell: Callable[[str], None]) -> int:
    """Run a command's body and turn how it ended into an exit code, telling the user what went wrong.

    0 when all went well, 1 after an error, 130 after Ctrl-C. `again` is the command that resumes it.
    """
    try:
        act()
    except KeyboardInterrupt:
        tell(f"Stopped. Nothing half-finished was published; resume by the same command: {again}")
        return INTERRUPTED
    except Exception as error:
        told = message(error)
        if told is None:
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}"
        tell(told)
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
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def act() -> None:
        spec = specification(job, given.config, given.set)
        manifest, skipped = run_alone(spec, LogLines(job), given.force, given.address)
        _say(f"{job}: {'already done' if skipped else 'done'}: {output_of(spec)} ({len(manifest.files)} files)")

    words = sys.argv[1:] if arguments is None else list(arguments)
    return guarded(act, shlex.join(["python", "-m", f"calumma.jobs.{job}", *words]), _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
