"""MLflow: runs, metrics, pictures and the model registry, always through a client bound to one tracking URI.

Nothing here touches MLflow's global state, so one process can work with several servers, and a `Run` can be sent to
a Ray worker. Without a URI an SQLite database and a local artifact folder below ./mlflow are used.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from pydantic import BaseModel

from calumma.platform.config import JobSpecification, Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# MLflow's limits of one batched request (mlflow/utils/validation.py).
_PARAMS_A_BATCH = 100
_METRICS_A_BATCH = 1000
_NAME_LENGTH = 250
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


class TrackingError(RuntimeError):
    """MLflow cannot be used as asked; the message says what was asked, what was found and what to do."""


def resolve(tracking: Tracking) -> str:
    """The tracking URI to use: the given one, else $MLFLOW_TRACKING_URI, else SQLite below ./mlflow.

    A plain folder means an SQLite database in it. Paths of SQLite databases become absolute, and their folder is
    created: the workers of a job stand in other working directories.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlflow"
    if uri.startswith("file://"):
        uri = unquote(urlparse(uri).path)
    if "://" not in uri and ":" not in uri:
        uri = f"sqlite:///{Path(uri).absolute() / 'mlflow.db'}"
    database = _database(uri)
    if database is None:
        return uri
    database = database.absolute()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"cannot create the folder of the tracking database {database}: {error}") from error
    return f"sqlite:///{database}"


class Run:
    """One MLflow run. Picklable: a copy in another process writes to the same run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.id = uri, run_id
        self._client: MlflowClient | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "id": self.id, "_client": None}

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = _connect(self.uri)
        return self._client

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters of the run; nested mappings become dotted names."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)) for key, value in flatten(params).items()]
        for i in range(0, len(entries), _PARAMS_A_BATCH):
            self.client.log_batch(self.id, params=entries[i : i + _PARAMS_A_BATCH])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(k, float(v), now, step or 0) for k, v in metrics.items()])

    def log_image(self, image: Image, path: str) -> None:
        """A picture as artifact `path`, say `samples/0.png`."""
        self.client.log_image(self.id, image, artifact_file=path)

    def log_artifact(self, local_path: str | Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.id, str(local_path), folder)

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        """A JSON artifact, say `checkpoints/step-00000100.json`."""
        self.client.log_dict(self.id, values, path)

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return dict(self.client.get_run(self.id).data.metrics)


class BackgroundWriter:
    """Writes to a run from a background thread, so that training never waits for MLflow.

    Metrics that cannot be written are kept and sent with the next ones; a server that is away for a while loses none.
    """

    def __init__(self, run: Run, keep: int = 100_000) -> None:
        self._run, self._keep = run, keep
        self._pending: list[tuple[str, float, int, int]] = []
        self._warned = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tracking")

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [(name, float(value), now, step) for name, value in metrics.items()]
        self._executor.submit(self._write, entries)

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        """A JSON artifact; a failure is a warning."""
        self._executor.submit(self._attempt, path, lambda: self._run.log_dict(values, path))

    def log_image(self, image: Image, path: str) -> None:
        """A picture; a failure is a warning."""
        self._executor.submit(self._attempt, path, lambda: self._run.log_image(image, path))

    def close(self) -> int:
        """Write what is left; the number of metric values that could not be written."""
        self._executor.submit(self._write, [])
        self._executor.shutdown(wait=True)
        if self._pending:
            logger.warning("%d metric values could not be written to %s", len(self._pending), self._run.uri)
        return len(self._pending)

    def _write(self, entries: list[tuple[str, float, int, int]]) -> None:
        self._pending = [*self._pending, *entries][-self._keep :]
        while self._pending and self._attempt("metrics", self._send):
            self._pending = self._pending[_METRICS_A_BATCH:]

    def _send(self) -> None:
        from mlflow.entities import Metric

        batch = [Metric(*entry) for entry in self._pending[:_METRICS_A_BATCH]]
        self._run.client.log_batch(self._run.id, metrics=batch)

    def _attempt(self, what: str, action: Any) -> bool:
        try:
            action()
        except Exception as error:  # MlflowException, requests', SQLAlchemy's: whatever it is, training goes on
            if not self._warned:
                logger.warning("MLflow at %s did not take %s, training goes on: %s", self._run.uri, what, error)
            self._warned = True
            return False
        self._warned = False
        return True


@contextmanager
def run(spec: JobSpecification) -> Iterator[Run]:
    """An MLflow run for a job: parameters logged, ended as FINISHED, FAILED, or KILLED on Ctrl-C.

    Raises TrackingError when MLflow cannot be reached or used.
    """
    uri = resolve(spec.tracking)
    try:
        client = _connect(uri)
        current = Run(uri, _create_run(client, uri, spec))
        current.log_params(spec.model_dump(mode="json"))
    except Exception as error:
        raise TrackingError(
            f"cannot start an MLflow run at {uri} (experiment {spec.tracking.experiment!r}): {error}\n"
            f"Check `tracking.uri`, or leave it away to use a database below ./mlflow."
        ) from error
    status = "KILLED"
    try:
        yield current
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        try:
            client.set_terminated(current.id, status)
        except Exception as error:
            logger.warning("MLflow at %s did not take the end of run %s: %s", uri, current.id, error)


def register(tracking: Tracking, name: str, model_directory: str, run_id: str, alias: str | None = None) -> str:
    """A new version of the registered model `name` whose source is a model directory; its `models:/` URI.

    Raises TrackingError when the registry refuses, say a server that does not allow local folders as source.
    """
    from mlflow.exceptions import MlflowException

    uri = resolve(tracking)
    client = _connect(uri)
    source = model_directory if "://" in model_directory else str(Path(model_directory).absolute())
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(name, source, run_id, await_creation_for=0)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise TrackingError(
            f"the model registry at {uri} did not take {source} as {name!r}: {error.message}"
        ) from error
    return f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"


def model_source(uri: str, tracking: Tracking | None = None) -> str:
    """The model directory (URI or path) behind `models:/name@alias`, `models:/name/3`, or itself.

    Raises TrackingError naming what the registry has when there is no such model.
    """
    if not uri.startswith("models:"):
        return uri
    match = _MODEL_URI.match(uri)
    if match is None:
        raise TrackingError(
            f"{uri!r} is not a model URI: models:/NAME@ALIAS or models:/NAME/VERSION, say models:/calumma@champion"
        )
    from mlflow.exceptions import MlflowException

    server = resolve(tracking or Tracking())
    client = _connect(server)
    name = match["name"]
    try:
        if match["alias"]:
            found = client.get_model_version_by_alias(name, match["alias"])
        else:
            found = client.get_model_version(name, match["version"])
    except MlflowException as error:
        raise TrackingError(
            f"{uri} is not in the registry at {server}: {error.message}\n{_inventory(client, name)}"
        ) from error
    source = str(found.source)
    return unquote(urlparse(source).path) if source.startswith("file://") else source


@contextmanager
def resolve_model(uri: str, tracking: Tracking | None = None) -> Iterator[Path]:
    """A local model directory for `models:/name@alias`, `models:/name/3`, `s3://...` or a local directory.

    Remote directories are downloaded and removed at the end. Raises TrackingError when there is no such model.
    """
    from calumma.platform import storage

    source = model_source(uri, tracking)
    if urlparse(source).scheme in ("mlflow-artifacts", "runs"):
        with tempfile.TemporaryDirectory(prefix="calumma-model-") as folder:
            import mlflow

            server = resolve(tracking or Tracking())
            local = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=server)
            yield _checked(Path(local), uri, source)
        return
    if not storage.exists(storage.join(source, "config.json")):
        origin = "" if source == uri else f" (registered as {source})"
        raise TrackingError(f"there is no model directory at {uri}{origin}: no config.json in it")
    with storage.local_copy(source) as path:
        yield _checked(path, uri, source)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one level of dotted names that MLflow accepts as parameter names.

    Names that become equal are told apart by a number: no value is lost.
    """
    flat: dict[str, Any] = {}
    for key, value in _leaves(values, ""):
        name = plain = _parameter_name(key)
        number = 1
        while name in flat:
            number += 1
            name = f"{plain[: _NAME_LENGTH - len(str(number)) - 1]} {number}"
        flat[name] = value
    return flat


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parameter_name(key: str) -> str:
    """The name nearest to `key` that MLflow takes: few characters, and as a path equal to its normal form."""
    name = re.sub(r"[^\w\-./: ]", "_", key)[-_NAME_LENGTH:]
    parts = ["__" if part == ".." else part for part in name.split("/") if part not in ("", ".")]
    name = "/".join(parts) or "_"
    return f"__{name[2:]}" if name.startswith("..") else name


def _database(uri: str) -> Path | None:
    """The file of an SQLite tracking URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _connect(uri: str) -> MlflowClient:
    # MLflow's usage telemetry calls home from every process; on machines without a way out it only costs time.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    # Creating the database logs one line for each of some sixty migrations.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_run(client: MlflowClient, uri: str, spec: JobSpecification) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    experiment = _experiment(client, uri, spec.tracking.experiment)
    tags = resolve_tags({"calumma.job": spec.job})
    return str(client.create_run(experiment, tags=tags, run_name=spec.run_name or spec.job).info.run_id)


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id; created when it is new, with its artifacts beside an SQLite database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        database = _database(uri)
        artifacts = (database.parent / "artifacts" / name).as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
            found = client.get_experiment_by_name(name)
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise TrackingError(f"the experiment {name!r} was deleted; restore it in MLflow or name another one")
    return str(found.experiment_id)


def _inventory(client: MlflowClient, name: str) -> str:
    """What the registry does have, in words."""
    models = {model.name: model for model in client.search_registered_models(max_results=50)}
    if name not in models:
        return f"It has: {', '.join(sorted(models)) or 'no models'}."
    versions = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))
    aliases = ", ".join(f"@{a}" for a in sorted(models[name].aliases)) or "none"
    return f"{name!r} has versions {', '.join(map(str, versions)) or 'none'} and aliases {aliases}."


def _checked(path: Path, uri: str, source: str) -> Path:
    if not (path / "config.json").is_file():
        raise TrackingError(f"{uri} (at {source}) is not a model directory: there is no config.json in it")
    return path
