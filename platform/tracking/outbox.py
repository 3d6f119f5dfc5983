"""What is on its way to MLflow: kept on disk until the server has taken it, so that training never waits and nothing is
lost while the server is away.

$CALUMMA_OUTBOX or ~/.local/state/calumma/outbox/SERVER/RUN-NUMBER/0000000001.json   an entry, oldest first
                                                                  refused/            what the server will never take
A writer sends from a thread. What it leaves behind, because the server stays away or the process is killed, is sent by
the next writer to the same server on this machine, by the next job's start, or by
`python -m calumma.platform.tracking.outbox`. A copy can be parked in storage, where a worker on another machine takes
it up.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from calumma.platform.tracking.run import Run

logger = logging.getLogger(__name__)
_METRICS_A_BATCH = 1000  # MLflow's limit of one batched request (mlflow/utils/validation.py)
# With these the server says that it will never take an entry; anything else may pass.
PERMANENT_ERRORS = {
    "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST", "INVALID_STATE",
}  # fmt: skip


def root() -> Path:
    """The folder of all outboxes on this machine; below the temporary one where there is no home to write to."""
    if configured := os.environ.get("CALUMMA_OUTBOX"):
        return Path(configured)
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "calumma", "outbox")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir(), "calumma-outbox")


class Outbox:
    """Entries of one run in a folder of its own, which is locked while this object lives."""

    def __init__(self, folder: Path, uri: str, run_id: str) -> None:
        self.folder, self.uri, self.run_id = folder, uri, run_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run").write_text(json.dumps({"uri": uri, "run": run_id}))
        self._lock = (folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._number = max((int(path.stem) for path in self.entries()), default=0)

    @classmethod
    def new(cls, uri: str, run_id: str) -> Outbox:
        return cls(_server(uri) / f"{run_id}-{uuid.uuid4().hex[:8]}", uri, run_id)

    def put(self, kind: str, content: dict[str, Any]) -> None:
        """Append an entry; it is on the disk when this returns."""
        self._number += 1
        path = self.folder / f"{self._number:010d}.json"
        unfinished = path.with_suffix(".part")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump({"kind": kind, "content": content}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)

    def entries(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.json"))

    def pending(self) -> int:
        """Entries that are not sent; a metrics entry counts its values."""
        return sum(len(e["content"].get("values", "1")) for e in map(_read, self.entries()) if e)

    def send(self, run: Run) -> None:
        """Send everything, oldest first. Raises what MLflow's client raises when the server is away."""
        while batch := _batch(self.entries()):
            try:
                _send_entries(run, [entry for _, entry in batch])
            except Exception as error:
                if getattr(error, "error_code", None) not in PERMANENT_ERRORS:
                    raise
                if len(batch) == 1:
                    self._refuse(batch[0][0], error)
                else:
                    self._one_by_one(run, batch)
                continue
            for path, _ in batch:
                path.unlink()

    def back_up(self, uri: str) -> None:
        """A copy of what waits, in storage below `uri`, in place of the one before. Raises StorageError."""
        from calumma.platform import storage

        place = storage.join(uri, self.folder.name)
        storage.delete(place)
        for path in [self.folder / "run", *self.entries()]:
            storage.write_bytes(storage.join(place, path.name), path.read_bytes())

    def close(self) -> None:
        """Unlock; an empty outbox disappears."""
        empty = not self.entries() and not (self.folder / "refused").exists()
        self._lock.close()
        if empty:
            for name in ("run", "lock"):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has just taken it up
                self.folder.rmdir()

    def _one_by_one(self, run: Run, batch: list[tuple[Path, dict[str, Any]]]) -> None:
        for path, entry in batch:
            try:
                _send_entries(run, [entry])
            except Exception as error:
                if getattr(error, "error_code", None) not in PERMANENT_ERRORS:
                    raise
                self._refuse(path, error)
            else:
                path.unlink()

    def _refuse(self, path: Path, error: Exception) -> None:
        aside = self.folder / "refused"
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
        logger.warning("MLflow at %s refuses an entry of run %s, kept in %s: %s", self.uri, self.run_id, aside, error)


def send_pending(uri: str, backup: str | None = None) -> int:
    """Send what writers to a server have left behind on this machine, and in storage; the number of outboxes emptied.

    Raises what MLflow's client raises when the server is away.
    """
    from calumma.platform.tracking.run import Run

    if backup is not None:
        _restore_backups(uri, backup)
    emptied = 0
    for folder in sorted(_server(uri).glob("*-*")):
        outbox = _lock_outbox(folder)
        if outbox is None:
            continue
        try:
            if outbox.entries():
                outbox.send(Run(outbox.uri, outbox.run_id))
                delete_backup(backup, folder.name)
                emptied += 1
        finally:
            outbox.close()
    return emptied


def _lock_outbox(folder: Path) -> Outbox | None:
    """The outbox of a folder that no writer holds; a damaged folder is left alone."""
    run = _read(folder / "run")
    if run is None:
        return None
    try:
        return Outbox(folder, run["uri"], run["run"])
    except OSError:  # a living writer's
        return None


def _restore_backups(uri: str, backup: str) -> None:
    """Bring parked outboxes of other machines here. Raises StorageError."""
    from calumma.platform import storage

    for place in storage.list_files(backup):
        folder, name = place.rsplit("/", 2)[-2:]
        target = _server(uri) / folder / name
        if folder == Path(folder).name and not target.exists() and not (target.parent / "lock").exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(place))


def delete_backup(backup: str | None, name: str) -> None:
    if backup is not None:
        from calumma.platform import storage

        storage.delete(storage.join(backup, name))


def _server(uri: str) -> Path:
    return root() / hashlib.sha256(uri.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def _batch(paths: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The oldest entry; as many metrics as one request takes when it is metrics."""
    batch: list[tuple[Path, dict[str, Any]]] = []
    size = 0
    for path in paths:
        entry = _read(path)
        if entry is None:  # cut off by a full disk: nothing to send
            path.rename(path.with_suffix(".damaged"))
            continue
        if batch and (entry["kind"] != "metrics" or size + len(entry["content"]["values"]) > _METRICS_A_BATCH):
            break
        batch.append((path, entry))
        if entry["kind"] != "metrics":
            break
        size += len(entry["content"]["values"])
    return batch


def _send_entries(run: Run, entries: list[dict[str, Any]]) -> None:
    """Send one entry, or several of metrics. All may be sent twice: what they do the second time changes nothing."""
    kind, content = entries[0]["kind"], entries[0]["content"]
    if kind == "metrics":
        run.log_values([tuple(value) for entry in entries for value in entry["content"]["values"]])
    elif kind == "dict":
        run.log_dict(content["dict"], content["path"])
    elif kind == "image":
        run.log_image(_decode_png(content["png"]), content["path"])
    elif kind == "artifact":
        _send_artifact(run, content)
    elif kind == "checkpoint":
        run.log_checkpoint(**content)
    elif kind == "tags":
        run.log_tags(content["tags"])
    elif kind == "data":
        run.log_data(content["manifests"], content["context"])
    elif kind == "register":
        run.register(**content)
    elif kind == "end":
        run.client.set_terminated(run.id, content["status"], content["time"])
    else:
        raise ValueError(f"unknown entry {kind!r} in the outbox; was it written by a newer version?")


def _send_artifact(run: Run, content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="calumma-artifact-") as folder:
        file = Path(folder, Path(content["name"]).name)
        file.write_bytes(base64.b64decode(content["data"]))
        run.log_artifact(file, content["folder"])


def _decode_png(png: str) -> Image:
    from PIL import Image as PILImage

    return PILImage.open(io.BytesIO(base64.b64decode(png)))


def _servers() -> Iterator[str]:
    """Tracking URIs that something waits for on this machine."""
    uris = {(_read(path) or {}).get("uri") for path in root().glob("*/*-*/run")}
    yield from sorted(uri for uri in uris if uri)


def main() -> int:
    """Send everything that waits on this machine: 0 when it is sent, 1 when a server is away."""
    failed = 0
    for uri in _servers():
        try:
            print(f"{uri}: {send_pending(uri)} runs sent")
        except Exception as error:
            print(f"{uri}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
