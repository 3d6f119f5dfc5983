"""Runs one job: skip it when its result stands, check what it asks for, track it, call it.

A job is a function of its specification, its MLflow run and a progress listener that returns the manifest of what it
made. Which function a name stands for is told in calumma.jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.platform.cluster import capacity, connection
from calumma.platform.cluster.progress import Progress, silent
from calumma.platform.specification import JobSpecification

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run


Job = Callable[[Any, "Run", Progress], "Manifest"]


def standing(spec: JobSpecification) -> Manifest | None:
    """The manifest of an equal specification's finished result, if there is one with its files all there.

    One listing tells; contents are not read. Raises as `finished`.
    """
    from calumma.platform.tracking import fingerprints

    return fingerprints.standing(spec.output_uri, spec)


def discard(spec: JobSpecification) -> None:
    """Take away what a job has made so far (its manifest, the files that names, its checkpoints) and nothing else."""
    from calumma.platform import storage
    from calumma.platform.shards import receipts
    from calumma.platform.storage.manifest import MANIFEST, Manifest

    place = spec.output_uri
    manifest = Manifest.find(place)
    for path in [MANIFEST, *(entry.path for entry in manifest.files)] if manifest else []:
        storage.delete(storage.join(place, path))
    storage.delete(storage.join(place, receipts.FOLDER))
    storage.delete(spec.checkpoints)


def run_job(
    spec: JobSpecification, job: Job, progress: Progress = silent, force: bool = False
) -> tuple[Manifest, bool]:
    """Run a job on the cluster this process is connected to (see calumma.platform.cluster).

    Returns its manifest, and whether it was skipped because an equal specification's result stands already; `force`
    first discards that result and any checkpoints to resume from. Raises SpecificationError, before anything is
    tracked, when the cluster lacks what the job asks for. An exception of the job marks its MLflow run as failed and
    goes on to the caller.
    """
    if not force and (done := standing(spec)) is not None:
        return done, True
    capacity.require(spec.resources)
    if force:
        discard(spec)

    from calumma.platform.tracking.job_run import job_run

    with job_run(spec) as run:
        return job(spec, run, progress), False


def run_alone(
    spec: JobSpecification,
    job: Job,
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
        capacity.require(spec.resources)
    if address:
        place: AbstractContextManager[object] = connection.connected(address)
    else:
        place = connection.embedded(logs=logs) if spec.resources.max_workers else nullcontext()
    with place:
        return run_job(spec, job, progress, force)
