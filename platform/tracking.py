"""MLflow: runs, metrics, pictures and the model registry, always through a client bound to one tracking URI.

Nothing here touches MLflow's global state, so one process can work with several servers, and a `Run` can be sent to
a Ray worker. Without a URI an SQLite database and a local artifact folder below ./mlflow are used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from pydantic import BaseModel

from calumma.platform import provenance
from calumma.platform.config import JobSpecification, Tracking
from calumma.platform.outbox import BackgroundWriter, Outbox, send_left

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

__all__ = ["BackgroundWriter", "Run", "TrackingError", "model_source", "register", "resolve", "resolve_model", "run"]
logger = logging.getLogger(__name__)

_PARAMS_A_BATCH = 100  # MLflow's limit of one batched request (mlflow/utils/validation.py)
_NAME_LENGTH = 250
_PARENT = "mlflow.parentRunId"
_PROJECT = "calumma.project"
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
        now = int(time.time() * 1000)
        self.log_values([(name, float(value), now, step or 0) for name, value in metrics.items()])

    def log_values(self, values: Sequence[tuple[str, float, int, int]]) -> None:
        """Metrics as (name, value, milliseconds since 1970, step)."""
        from mlflow.entities import Metric

        self.client.log_batch(self.id, metrics=[Metric(*value) for value in values])

    def log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_checkpoint(
        self, name: str, uri: str, step: int, metrics: dict[str, float], tags: dict[str, str], time: int
    ) -> None:
        """A checkpoint in storage as a logged model that this run has put out at `step`, with the metrics of then,
        `time` in milliseconds since 1970. They are called `checkpoint/...`: a model's metrics are its run's, too.

        https://mlflow.org/docs/latest/ml/tracking/tracking-api/ (checkpoints are models of their own since MLflow 3)
        """
        from mlflow.entities import LoggedModelOutput, Metric
        from mlflow.entities.logged_model_status import LoggedModelStatus

        experiment = self.client.get_run(self.id).info.experiment_id
        mine = f"name = '{name}' AND source_run_id = '{self.id}'"
        if not (found := list(self.client.search_logged_models([experiment], filter_string=mine, max_results=1))):
            given = {"calumma.uri": uri, "calumma.step": str(step)} | tags
            found = [self.client.create_logged_model(experiment, name, self.id, given, model_type="checkpoint")]
        model = found[0].model_id
        if found[0].status == LoggedModelStatus.READY:  # sent before
            return
        values = [Metric(f"checkpoint/{k}", v, time, step, model_id=model) for k, v in metrics.items()]
        self.client.log_batch(self.id, metrics=values)
        self.client.log_outputs(self.id, [LoggedModelOutput(model, step)])
        self.client.finalize_logged_model(model, LoggedModelStatus.READY)

    def log_data(self, manifests: dict[str, str], context: str) -> None:
        """Directories of data, by the fingerprints of their manifests, as inputs of the run; `context`: what for."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(uri.rstrip("/").rpartition("/")[2], fingerprint[:36], "calumma", json.dumps({"uri": uri})),
                [InputTag("mlflow.data.context", context)],
            )
            for uri, fingerprint in manifests.items()
        ]
        self.client.log_inputs(self.id, inputs)

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
    with suppress(Exception):  # it has just gone away again: they stay where they are
        send_left(uri)
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
        parent = current.client.get_run(current.id).data.tags.get(_PARENT)
        if parent:
            current.client.set_terminated(parent, "FINISHED", now)
    except Exception as error:
        outbox = Outbox.new(current.uri, current.id)
        outbox.put("end", {"status": status, "time": now})
        outbox.close()
        logger.warning("MLflow at %s is away, the end of run %s waits on disk: %s", current.uri, current.id, error)


def registered_copy(model_directory: str) -> str:
    """Where the files of a published model directory stay once it is registered: beside it, named by their content.

    The next training replaces the directory, but no version of the registry. What calumma has not published (an
    imported model) is registered where it is.
    """
    from calumma.platform import storage
    from calumma.platform.data.manifest import Manifest, fingerprints

    place = model_directory if "://" in model_directory else str(Path(model_directory).absolute())
    if Manifest.find(place) is None:
        return place
    (mark,) = fingerprints([place]).values()
    return storage.join(place.rstrip("/").rpartition("/")[0], "registered", mark[:16])


def register(tracking: Tracking, name: str, model_directory: str, run_id: str, alias: str | None = None) -> str:
    """A new version of the registered model `name`, whose source is a copy of a model directory; its `models:/` URI.

    Raises TrackingError when the registry refuses, say a server that does not allow local folders as source, and
    StorageError when the copy cannot be written.
    """
    from mlflow.exceptions import MlflowException

    from calumma.platform import storage
    from calumma.platform.data.manifest import Manifest

    uri = resolve(tracking)
    client = _connect(uri)
    source = registered_copy(model_directory)
    if Manifest.find(model_directory) is not None and Manifest.find(source) is None:
        with storage.local_copy(model_directory) as files:
            storage.upload(files, source)
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name, source, run_id, provenance.lineage(model_directory), await_creation_for=0
        )
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
    tags = resolve_tags({"calumma.job": spec.job} | provenance.commit())
    if spec.tracking.project:
        tags[_PARENT] = _project(client, experiment, spec.tracking.project)
    return str(client.create_run(experiment, tags=tags, run_name=spec.run_name or spec.job).info.run_id)


def _project(client: MlflowClient, experiment: str, name: str) -> str:
    """The run that stands for a project; created when it is new. Of two that were created at once, the older."""
    quoted = name.replace("'", "")
    mine = f"tags.`{_PROJECT}` = '{quoted}'"

    def oldest() -> str | None:
        found = client.search_runs([experiment], mine, order_by=["attributes.start_time ASC"], max_results=1)
        return str(found[0].info.run_id) if found else None

    if (known := oldest()) is not None:
        return known
    client.create_run(experiment, tags={_PROJECT: quoted}, run_name=name)
    return str(oldest())


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
