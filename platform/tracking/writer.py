"""The writer of a run in training: everything goes through an outbox, from a thread."""

from __future__ import annotations

import base64
import io
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from calumma.platform.tracking.mirrors import Mirrors
from calumma.platform.tracking.names import valid_names
from calumma.platform.tracking.outbox import Outbox, delete_backup, send_pending

if TYPE_CHECKING:
    from PIL.Image import Image

    from calumma.platform.tracking.run import Run


logger = logging.getLogger(__name__)
_LONGEST_BACKOFF = 60.0  # seconds between two attempts at a server that is away
_FLUSH_POLL = 0.05  # seconds between two looks at what waits, when somebody waits for it
# Seconds, at least, between two requests for what training logs: what comes meanwhile goes at once.
_SEND_INTERVAL = 1.0
_CLOSE_TIMEOUT = 30.0  # seconds that closing waits for a server that is away


class BackgroundWriter:
    """Writes to a run through an outbox, from a thread, so that training never waits for MLflow and loses nothing."""

    def __init__(
        self,
        run: Run,
        backup: str | None = None,
        close_timeout: float = _CLOSE_TIMEOUT,
        mirrors: Mirrors | None = None,
    ) -> None:
        """`backup`: where in storage copies of what waits are kept (see `back_up`). `mirrors`: what is told metrics and
        pictures, too."""
        self._mirrors = mirrors
        self._run, self._backup, self._close_timeout = run.plain(), backup, close_timeout
        self._outbox = Outbox.new(run.uri, run.id)
        self._wake, self._flush_now, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        names = valid_names(metrics)
        if self._mirrors is not None:
            self._mirrors.log(metrics, step)
        self._put("metrics", {"values": [[names[name], float(value), now, step] for name, value in metrics.items()]})

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        """A JSON artifact."""
        self._put("dict", {"path": path, "dict": values})

    def log_image(self, image: Image, path: str) -> None:
        """A picture, kept as PNG."""
        if self._mirrors is not None:
            self._mirrors.log_image(image, path)
        file = io.BytesIO()
        image.save(file, "PNG")
        self._put("image", {"path": path, "png": base64.b64encode(file.getvalue()).decode()})

    def log_checkpoint(self, name: str, uri: str, step: int, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """A checkpoint as a logged model of the run, with its step and metrics."""
        now = int(time.time() * 1000)
        checkpoint = {"name": name, "uri": uri, "step": step, "metrics": metrics, "tags": tags, "time": now}
        self._put("checkpoint", checkpoint)

    def log_tags(self, tags: dict[str, str]) -> None:
        self._put("tags", {"tags": tags})

    def log_data(self, manifests: dict[str, str], context: str) -> None:
        """Directories of data and the fingerprints of their manifests, as the run's inputs."""
        self._put("data", {"manifests": manifests, "context": context})

    def back_up(self) -> None:
        """Copy to storage what waits for a server that is away, if anything does; a failure is a warning."""
        if self._backup is None or not self._away:
            return
        try:
            self._outbox.back_up(self._backup)
        except OSError as error:
            logger.warning("what waits for MLflow could not be copied to %s: %s", self._backup, error)

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sent, or the time is over; whether it is sent."""
        deadline = time.monotonic() + timeout
        self._flush_now.set()
        self._wake.set()
        while self._outbox.entries():
            if time.monotonic() > deadline or not self._thread.is_alive():
                return False
            time.sleep(_FLUSH_POLL)
        return True

    def close(self) -> int:
        """Send what is left; the number of entries and metric values that wait on disk for a later writer."""
        if self._mirrors is not None:
            self._mirrors.close()
        self.flush(self._close_timeout)
        self._closing.set()
        self._flush_now.set()
        self._wake.set()
        self._thread.join(self._close_timeout)
        left = self._outbox.pending()
        if left:
            again = "the next job sends them, or: python -m calumma.platform.tracking.outbox"
            logger.warning(
                "MLflow at %s is away: %d values wait in %s; %s", self._run.uri, left, self._outbox.folder, again
            )
            self._away = True
            self.back_up()
        self._outbox.close()
        return left

    def _put(self, kind: str, content: dict[str, Any]) -> None:
        try:
            self._outbox.put(kind, content)
        except OSError as error:  # a full disk must not end a training run
            logger.error("%s for MLflow could not be kept on disk and is lost: %s", kind, error)
        self._wake.set()

    def _work(self) -> None:
        pause, others = 1.0, False
        while not self._closing.is_set():
            self._wake.clear()
            try:
                self._outbox.send(self._run)
                if not others:
                    others = True
                    send_pending(self._run.uri, self._backup)
                if self._away:
                    self._away = False
                    logger.warning("MLflow at %s is back and has everything", self._run.uri)
                    delete_backup(self._backup, self._outbox.folder.name)
                pause = 1.0
                self._wake.wait()
                self._flush_now.wait(_SEND_INTERVAL)
                self._flush_now.clear()
            except Exception as error:  # MlflowException, requests', SQLAlchemy's: whatever it is, training goes on
                if not self._away:
                    logger.warning("MLflow at %s is away, training goes on: %s", self._run.uri, error)
                self._away = True
                pause = _FLUSH_POLL if self._flush_now.wait(pause) else min(2 * pause, _LONGEST_BACKOFF)
                self._flush_now.clear()
