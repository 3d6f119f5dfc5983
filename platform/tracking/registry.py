"""MLflow's model registry: versions of model directories, and the directory behind a `models:/` URI."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from calumma.platform.specification import Tracking
from calumma.platform.tracking import provenance
from calumma.platform.tracking.server import TrackingError, connect, resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException


_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


def registered_copy(model_directory: str) -> str:
    """Where the files of a published model directory stay once it is registered: beside it, named by their content.

    The next training replaces the directory, but no version of the registry. What calumma has not published (an
    imported model) is registered where it is.
    """
    from calumma.platform import storage
    from calumma.platform.storage.manifest import Manifest, directory_fingerprint

    source = model_directory if "://" in model_directory else str(Path(model_directory).absolute())
    if Manifest.find(source) is None:
        return source
    fingerprint = directory_fingerprint(source)
    return storage.join(source.rstrip("/").rpartition("/")[0], "registered", fingerprint[:16])


def register(tracking: Tracking, name: str, model_directory: str, run_id: str, alias: str | None = None) -> str:
    """A new version of the registered model `name`, whose source is a copy of a model directory; its `models:/` URI.

    Raises TrackingError when the registry refuses, say a server that does not allow local folders as source, and
    StorageError when the copy cannot be written.
    """
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(tracking)
    source = copy_to_register(model_directory)
    try:
        return register_version(connect(uri), name, source, run_id, provenance.lineage(model_directory), alias)
    except MlflowException as error:
        raise refusal(uri, name, source, error) from error


def copy_to_register(model_directory: str) -> str:
    """Copy a model directory to where registered ones stay; the copy's URI. Raises StorageError."""
    from calumma.platform import storage
    from calumma.platform.storage.manifest import Manifest

    source = registered_copy(model_directory)
    if Manifest.find(model_directory) is not None and Manifest.find(source) is None:
        with storage.local_copy(model_directory) as files:
            storage.upload(files, source)
    return source


def register_version(
    client: MlflowClient, name: str, source: str, run_id: str, tags: dict[str, str], alias: str | None
) -> str:
    """The version of `name` with this source and run, made where there is none; its `models:/` URI. Doing it twice
    changes nothing. Raises what MLflow's client raises."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = [v for v in client.search_model_versions(f"name = '{name}'") if (v.source, v.run_id) == (source, run_id)]
    version = made[0] if made else client.create_model_version(name, source, run_id, tags, await_creation_for=0)
    if alias:
        client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"


def refusal(uri: str, name: str, source: str, error: MlflowException) -> TrackingError:
    return TrackingError(f"the model registry at {uri} did not take {source} as {name!r}: {error.message}")


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

    server = resolve_uri(tracking or Tracking())
    client = connect(server)
    name = match["name"]
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(name, match["alias"])
        else:
            version = client.get_model_version(name, match["version"])
    except MlflowException as error:
        raise TrackingError(
            f"{uri} is not in the registry at {server}: {error.message}\n{_describe_registry(client, name)}"
        ) from error
    source = str(version.source)
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

            server = resolve_uri(tracking or Tracking())
            local = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=server)
            yield _require_config(Path(local), uri, source)
        return
    if not storage.exists(storage.join(source, "config.json")):
        origin = "" if source == uri else f" (registered as {source})"
        raise TrackingError(f"there is no model directory at {uri}{origin}: no config.json in it")
    with storage.local_copy(source) as path:
        yield _require_config(path, uri, source)


def _describe_registry(client: MlflowClient, name: str) -> str:
    """What the registry does have, in words."""
    models = {model.name: model for model in client.search_registered_models(max_results=50)}
    if name not in models:
        return f"It has: {', '.join(sorted(models)) or 'no models'}."
    versions = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))
    aliases = ", ".join(f"@{a}" for a in sorted(models[name].aliases)) or "none"
    return f"{name!r} has versions {', '.join(map(str, versions)) or 'none'} and aliases {aliases}."


def _require_config(path: Path, uri: str, source: str) -> Path:
    if not (path / "config.json").is_file():
        raise TrackingError(f"{uri} (at {source}) is not a model directory: there is no config.json in it")
    return path
