"""The MLflow run of a job, from its start to however it ends."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.platform.specification import JobSpecification
from calumma.platform.tracking.names import valid_names
from calumma.platform.tracking.outbox import PERMANENT_ERRORS, Outbox, send_pending
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import (
    PARENT_TAG,
    TrackingError,
    connect,
    create_run,
    resolve_uri,
    unreachable,
    wait_for_server,
)

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


class JobRun(Run):
    """The run that a job is given. What the server does not take, because it is away or refuses it, waits in an outbox:
    a job never fails for it after all its work, nor waits long for a server that is away."""

    away = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        now, names = int(time.time() * 1000), valid_names(metrics)
        values = [[names[name], float(value), now, step or 0] for name, value in metrics.items()]
        self._deliver(lambda: super(JobRun, self).log_metrics(metrics, step), "metrics", lambda: {"values": values})

    def log_tags(self, tags: dict[str, str]) -> None:
        self._deliver(lambda: super(JobRun, self).log_tags(tags), "tags", lambda: {"tags": tags})

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        content = {"path": path, "dict": values}
        self._deliver(lambda: super(JobRun, self).log_dict(values, path), "dict", lambda: content)

    def log_image(self, image: Image, path: str) -> None:
        def content() -> dict[str, Any]:
            file = io.BytesIO()
            image.save(file, "PNG")
            return {"path": path, "png": base64.b64encode(file.getvalue()).decode()}

        self._deliver(lambda: super(JobRun, self).log_image(image, path), "image", content)

    def log_artifact(self, local_path: str | Path, folder: str | None = None) -> None:
        def content() -> dict[str, Any]:
            file = Path(local_path)
            return {"name": file.name, "folder": folder, "data": base64.b64encode(file.read_bytes()).decode()}

        self._deliver(lambda: super(JobRun, self).log_artifact(local_path, folder), "artifact", content)

    def register(self, name: str, source: str, tags: dict[str, str], alias: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        from calumma.platform.tracking.registry import refusal

        registered: list[str | None] = []

        def send() -> None:
            try:
                registered.append(super(JobRun, self).register(name, source, tags, alias))
            except MlflowException as error:
                if error.error_code in PERMANENT_ERRORS:
                    refused.append(refusal(self.uri, name, source, error))
                    return
                raise

        refused: list[TrackingError] = []
        self._deliver(send, "register", lambda: {"name": name, "source": source, "tags": tags, "alias": alias})
        if refused:
            raise refused[0]
        return registered[0] if registered else None

    def set_terminated(self, status: str, milliseconds: int) -> None:
        """Mark the run, and the project's run above it, as ended."""

        def send() -> None:
            self.client.set_terminated(self.id, status, milliseconds)
            parent = self.client.get_run(self.id).data.tags.get(PARENT_TAG)
            if parent:
                self.client.set_terminated(parent, "FINISHED", milliseconds)

        self._deliver(send, "end", lambda: {"status": status, "time": milliseconds})

    def _deliver(self, send: Callable[[], None], kind: str, content: Callable[[], dict[str, Any]]) -> None:
        """Send, or keep for later. Whatever is sent after something waits, waits too: entries keep their order."""
        problem: object = "it was away before" if self.away else unreachable(self.uri)
        if problem is None:
            try:
                send()
                return
            except Exception as error:  # MlflowException, requests', SQLAlchemy's
                problem = error
        try:
            outbox = Outbox.new(self.uri, self.id)
            outbox.put(kind, content())
            outbox.close()
        except OSError as error:  # a full disk
            logger.error(
                "%s for MLflow could be neither sent (%s) nor kept on disk, and is lost: %s", kind, problem, error
            )
            return
        if not self.away:
            place, again = outbox.folder.parent, "the next job sends it, or: python -m calumma.platform.tracking.outbox"
            told = "MLflow at %s does not take what run %s logs (%s); it waits in %s; %s"
            logger.warning(told, self.uri, self.id, problem, place, again)
        self.away = unreachable(self.uri) is not None


@contextmanager
def job_run(spec: JobSpecification) -> Iterator[JobRun]:
    """An MLflow run for a job: parameters logged, ended as FINISHED, FAILED, or KILLED on Ctrl-C.

    Raises TrackingError when MLflow cannot be reached or used.
    """
    uri = resolve_uri(spec.tracking)
    wait_for_server(uri)
    try:
        client = connect(uri)
        current = JobRun(uri, create_run(client, uri, spec))
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
        current.set_terminated(status, int(time.time() * 1000))
