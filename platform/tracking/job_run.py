"""The MLflow run of a job, from its start to however it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from calumma.platform.specification import JobSpecification
from calumma.platform.tracking.outbox import Outbox, send_pending
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import PARENT_TAG, TrackingError, connect, create_run, resolve_uri

logger = logging.getLogger(__name__)


@contextmanager
def job_run(spec: JobSpecification) -> Iterator[Run]:
    """An MLflow run for a job: parameters logged, ended as FINISHED, FAILED, or KILLED on Ctrl-C.

    Raises TrackingError when MLflow cannot be reached or used.
    """
    uri = resolve_uri(spec.tracking)
    try:
        client = connect(uri)
        current = Run(uri, create_run(client, uri, spec))
        current.log_params(spec.model_dump(mode="json"))
    except Exception as error:
        raise TrackingError(
            f"cannot start an MLflow run at {uri} (experiment {spec.tracking.experiment!r}): {error}\n"
            f"Check `tracking.uri`, or leave it away to use a database below ./mlflow."
        ) from error
    with suppress(Exception):  # it has just gone away again: they stay where they are
        send_pending(uri)
    status = "KILLED"
    try:
        yield current
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        _end(current, status)


def _end(current: Run, status: str) -> None:
    """Mark a run, and the project's run above it, as ended; later when the server is away."""
    now = int(time.time() * 1000)
    try:
        current.client.set_terminated(current.id, status, now)
        parent = current.client.get_run(current.id).data.tags.get(PARENT_TAG)
        if parent:
            current.client.set_terminated(parent, "FINISHED", now)
    except Exception as error:
        outbox = Outbox.new(current.uri, current.id)
        outbox.put("end", {"status": status, "time": now})
        outbox.close()
        logger.warning("MLflow at %s is away, the end of run %s waits on disk: %s", current.uri, current.id, error)
