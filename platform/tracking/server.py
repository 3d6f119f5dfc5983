"""The tracking server: which URI, a client bound to it, experiments and runs.

Nothing here touches MLflow's global state, so one process can work with several servers. Without a URI an SQLite
database and a local artifact folder below ./mlflow are used."""

from __future__ import annotations

import logging
import os
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from calumma.platform.specification import JobSpecification, Tracking
from calumma.platform.tracking import provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient


logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a job waits for a server to answer before it begins
_PAUSE, _PROBE_TIMEOUT = 5.0, 5.0  # seconds between two attempts, and of one
_GATEWAY_ERRORS = (502, 503, 504)  # of a proxy whose server is away
PARENT_TAG = "mlflow.parentRunId"
_PROJECT = "calumma.project"


class TrackingError(RuntimeError):
    """MLflow cannot be used as asked; the message says what was asked, what was found and what to do."""


def resolve_uri(tracking: Tracking) -> str:
    """The tracking URI to use: the given one, else $MLFLOW_TRACKING_URI, else SQLite below ./mlflow.

    A plain folder means an SQLite database in it. Paths of SQLite databases become absolute, and their folder is
    created: the workers of a job stand in other working directories.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlflow"
    if uri.startswith("file://"):
        uri = unquote(urlparse(uri).path)
    if "://" not in uri and ":" not in uri:
        uri = f"sqlite:///{Path(uri).absolute() / 'mlflow.db'}"
    database = database_file(uri)
    if database is None:
        return uri
    database = database.absolute()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrackingError(f"cannot create the folder of the tracking database {database}: {error}") from error
    return f"sqlite:///{database}"


def database_file(uri: str) -> Path | None:
    """The file of an SQLite tracking URI."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def connect(uri: str) -> MlflowClient:
    # MLflow's usage telemetry calls home from every process; on machines without a way out it only costs time.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    # Creating the database logs one line for each of some sixty migrations.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if (database := database_file(uri)) is not None and not database.exists():
        _create(database)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create(database: Path) -> None:
    """A new database appears whole: MLflow does not go on with one whose creation was stopped. Of two processes that
    create it at once, the first one's stays."""
    from mlflow import MlflowClient

    own = database.with_name(f".{database.name}.{os.getpid()}-{time.monotonic_ns()}")
    try:
        MlflowClient(tracking_uri=f"sqlite:///{own}").search_experiments(max_results=1)
        with suppress(FileExistsError):
            os.link(own, database)
    finally:
        own.unlink(missing_ok=True)


def wait_for_server(uri: str, patience: float = PATIENCE) -> None:
    """Wait until a server over HTTP answers, and tell at once, and again and again, when it does not: MLflow's client
    would try for minutes in silence. Raises TrackingError when it has not answered in so many seconds."""
    end = time.monotonic() + patience
    while (problem := unreachable(uri)) is not None:
        left = end - time.monotonic()
        if left <= 0:
            raise TrackingError(
                f"MLflow at {uri} does not answer ({problem}), tried for {patience:.0f} s; start it, or correct "
                "`tracking.uri`, or leave it away to use a database below ./mlflow"
            )
        logger.warning("MLflow at %s does not answer (%s); tried for %.0f s more", uri, problem, left)
        time.sleep(min(_PAUSE, left))


def unreachable(uri: str) -> str | None:
    """Why no answer comes from a tracking server over HTTP, or None where one does, whatever it says."""
    if not uri.startswith(("http://", "https://")):
        return None
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_PROBE_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        return f"status {error.code}" if error.code in _GATEWAY_ERRORS else None
    except ssl.SSLError:  # how to trust it is for MLflow's own settings
        return None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__


def create_run(client: MlflowClient, uri: str, spec: JobSpecification) -> str:
    from mlflow.tracking.context.registry import resolve_tags

    experiment = _experiment(client, uri, spec.tracking.experiment)
    tags = resolve_tags({"calumma.job": spec.job} | provenance.commit())
    if spec.tracking.project:
        tags[PARENT_TAG] = _project(client, experiment, spec.tracking.project)
    return str(client.create_run(experiment, tags=tags, run_name=spec.run_name or spec.job).info.run_id)


def _project(client: MlflowClient, experiment: str, name: str) -> str:
    """The run that stands for a project; created when it is new. Of two that were created at once, the older."""
    quoted = name.replace("'", "")
    own_runs = f"tags.`{_PROJECT}` = '{quoted}'"

    def oldest() -> str | None:
        runs = client.search_runs([experiment], own_runs, order_by=["attributes.start_time ASC"], max_results=1)
        return str(runs[0].info.run_id) if runs else None

    if (known := oldest()) is not None:
        return known
    client.create_run(experiment, tags={_PROJECT: quoted}, run_name=name)
    return str(oldest())


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id; created when it is new, with its artifacts beside an SQLite database."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = database_file(uri)
        artifacts = (database.parent / "artifacts" / name).as_uri() if database else None
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another job was faster
                raise
            experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(f"the experiment {name!r} was deleted; restore it in MLflow or name another one")
    return str(experiment.experiment_id)
