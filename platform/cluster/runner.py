"""Runs one job: skip it when its result is reusable, check what it asks for, track it, call it.

A job is a function of its specification, its MLflow run and a progress listener that returns the manifest of what it
made. Which function a name stands for is calumma.jobs' to know.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.platform.cluster import capacity, connection
from calumma.platform.cluster.progress import Progress, no_progress
from calumma.platform.specification import JobSpecification, with_absolute_storage

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run


Job = Callable[[Any, "Run", Progress], "Manifest"]


def reusable_result(spec: JobSpecification) -> Manifest | None:
    """The manifest of an equal specification's finished result, if there is one with its files all there.

    Sizes are compared with one listing, contents are not read. Raises TrackingError, StorageError.
    """
    from calumma.platform.tracking import fingerprints

    return fingerprints.reusable_result(spec.output_uri, spec)


def delete_result(spec: JobSpecification) -> None:
    """Delete what a job has made so far: its manifest, the files named in it, its checkpoints; nothing else."""
    from calumma.platform import storage
    from calumma.platform.shards import receipts
    from calumma.platform.storage.manifest import MANIFEST, Manifest

    output = spec.output_uri
    manifest = Manifest.find(output)
    for path in [MANIFEST, *(entry.path for entry in manifest.files)] if manifest else []:
        storage.delete(storage.join(output, path))
    storage.delete(storage.join(output, receipts.FOLDER))
    storage.delete(spec.checkpoints)


def run_job(
    spec: JobSpecification, job: Job, progress: Progress = no_progress, force: bool = False
) -> tuple[Manifest, bool]:
    """Run a job on the cluster this process is connected to (see calumma.platform.cluster).

    Returns its manifest, and whether it was skipped because an equal specification's result is reusable; `force`
    first deletes that result and any checkpoints to resume from. Before anything is tracked it raises
    SpecificationError when the cluster lacks what the job asks for, and OutputTaken when another run is writing to the
    output. An exception of the job marks its MLflow run as failed and goes on to the caller.
    """
    if not force and (done := reusable_result(spec)) is not None:
        return done, True
    capacity.require_workers(spec.resources)

    from calumma.platform.storage import lease
    from calumma.platform.tracking.job_run import job_run

    with lease.held(with_absolute_storage(spec).output_uri, spec.resources.recovery.lease_seconds) as owned:
        if force:
            delete_result(spec)
        with job_run(spec) as run:
            owned.tell(run.id)
            run.fence = owned.fence
            return job(spec, run, progress), False


def run_on_own_cluster(
    spec: JobSpecification,
    job: Job,
    progress: Progress = no_progress,
    force: bool = False,
    address: str | None = None,
    logs: Path | None = None,
) -> tuple[Manifest, bool]:
    """`run_job` with a cluster for it alone: embedded in this process, or the one at `address`; none for 0 workers.

    What needs no cluster to find out (a reusable result, a machine too small) is found out before one is started.
    """
    if not force and (done := reusable_result(spec)) is not None:
        return done, True
    if address is None:
        capacity.require_workers(spec.resources)
    if address:
        cluster: AbstractContextManager[object] = connection.connected(address)
    else:
        cluster = connection.embedded(logs=logs) if spec.resources.max_workers else nullcontext()
    with cluster:
        return run_job(spec, job, progress, force)
