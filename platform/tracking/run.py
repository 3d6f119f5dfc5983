"""One MLflow run: parameters, metrics, pictures, checkpoints. A `Run` can be sent to a Ray worker."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.platform.tracking.names import flatten, valid_name, valid_names
from calumma.platform.tracking.server import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

    from calumma.platform.storage.lease import Fence


_PARAMS_A_BATCH = 100  # MLflow's limit of one batched request (mlflow/utils/validation.py)


class Run:
    """One MLflow run. Picklable: a copy in another process writes to the same run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.id = uri, run_id
        self.fence: Fence | None = None
        """By which the run knows whether the output of its job is still its own; none where it was not settled."""
        self._client: MlflowClient | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "id": self.id, "fence": self.fence, "_client": None}

    def check_output(self) -> None:
        """Before other runs can see what is written or deleted. Raises OutputTaken when the output is another's."""
        if self.fence is not None:
            self.fence.check()

    def plain(self) -> Run:
        """The same run, whose methods raise when the server does not take something."""
        run = Run(self.uri, self.id)
        run._client = self._client
        return run

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self.uri)
        return self._client

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters of the run; nested mappings become dotted names."""
        from mlflow.entities import Param

        entries = [
            Param(key, str(value).encode("utf-8", "backslashreplace").decode())
            for key, value in flatten(params).items()
        ]
        for i in range(0, len(entries), _PARAMS_A_BATCH):
            self.client.log_batch(self.id, params=entries[i : i + _PARAMS_A_BATCH])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Metrics; a name that MLflow refuses becomes the nearest that it takes."""
        now, names = int(time.time() * 1000), valid_names(metrics)
        self.log_values([(names[name], float(value), now, step or 0) for name, value in metrics.items()])

    def log_values(self, values: Sequence[tuple[str, float, int, int]]) -> None:
        """Metrics as (name, value, milliseconds since 1970, step)."""
        from mlflow.entities import Metric

        metrics = [Metric(valid_name(name), value, when, step) for name, value, when, step in values]
        self.client.log_batch(self.id, metrics=metrics)

    def log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(valid_name(name), value) for name, value in tags.items()])

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
        own_models = f"name = '{name}' AND source_run_id = '{self.id}'"
        if not (
            models := list(self.client.search_logged_models([experiment], filter_string=own_models, max_results=1))
        ):
            all_tags = {"calumma.uri": uri, "calumma.step": str(step)} | tags
            models = [self.client.create_logged_model(experiment, name, self.id, all_tags, model_type="checkpoint")]
        model = models[0].model_id
        if models[0].status == LoggedModelStatus.READY:  # sent before
            return
        values = [Metric(valid_name(f"checkpoint/{k}"), v, time, step, model_id=model) for k, v in metrics.items()]
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
        self.client.log_image(self.id, image, artifact_file=valid_name(path))

    def log_artifact(self, local_path: str | Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.id, str(local_path), folder)

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        """A JSON artifact, say `checkpoints/step-00000100.json`."""
        self.client.log_dict(self.id, values, valid_name(path))

    def register(self, name: str, source: str, tags: dict[str, str], alias: str | None) -> str | None:
        """The model directory `source` as a version of a registered model that this run has made; its `models:/` URI,
        or None where that follows later. Raises TrackingError when the registry refuses."""
        from calumma.platform.tracking.registry import register_version

        return register_version(self.client, name, source, self.id, tags, alias)

    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return dict(self.client.get_run(self.id).data.metrics)
