"""What the documentation reads of calumma's code: the one module of docs/ that imports it, so that a move of the code
is followed here alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from prometheus_client.metrics import MetricWrapperBase
from pydantic import BaseModel, TypeAdapter
from typer.main import get_command

from calumma.jobs.commands.main import app
from calumma.jobs.specifications.table import JOBS
from calumma.model.config import PRESETS, ImageLossConfig, ImageTokenizerConfig, ModelConfig
from calumma.model.ops.stability import BLOCK, OUTPUT
from calumma.platform.sources.registry import FORMATS, Format
from calumma.platform.specification import JobSpecification, SpecificationError, Tracking, validate
from calumma.platform.study.specification import StudySpecification
from calumma.platform.training.steps.meters import ACTIVITIES
from calumma.serve.http.app import create_app
from calumma.serve.http.metrics import COUNTERS, GAUGES, Metrics
from calumma.serve.http.wire.responses import ChatChunk, ImageEvent
from calumma.serve.settings import ServeSettings

__all__ = [
    "ACTIVITIES",
    "BLOCK",
    "COUNTERS",
    "FORMATS",
    "GAUGES",
    "JOBS",
    "OUTPUT",
    "PRESETS",
    "ROOT",
    "STREAMED",
    "Format",
    "ImageLossConfig",
    "ImageTokenizerConfig",
    "JobSpecification",
    "ModelConfig",
    "ServeSettings",
    "SpecificationError",
    "StudySpecification",
    "Tracking",
    "application",
    "command_line",
    "logged_metrics",
    "prometheus",
    "settings_of",
    "validate",
    "validate_part",
]

ROOT = Path(__file__).resolve().parents[1]
STREAMED: tuple[type[BaseModel], ...] = (ChatChunk, ImageEvent)  # what OpenAPI documents have no place for


def command_line() -> Any:
    """The command `calumma`, as click's command: `commands` of a group, `params` of each."""
    return get_command(app)


def application() -> FastAPI:
    """The HTTP application, over no model: enough to describe it."""
    backend: Any = None
    return create_app(backend, ServeSettings(model="model"))


def prometheus() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(name, kind, labels, meaning) of what an ingress counts itself; its engines' numbers are COUNTERS and GAUGES."""
    for collector in dict.fromkeys(Metrics()._registry._collector_to_names):
        if isinstance(collector, MetricWrapperBase):
            kind = str(collector._type)
            end = "_total" if kind == "counter" else ""
            yield f"{collector._name}{end}", kind, tuple(collector._labelnames), collector._documentation


def settings_of(job: str) -> type[BaseModel]:
    """What a YAML file of `job` holds; `serve` is the file of `calumma serve start --config`, `study` that of
    `calumma study create`."""
    others: dict[str, type[BaseModel]] = {"serve": ServeSettings, "study": StudySpecification}
    return others.get(job) or JOBS[job]


def validate_part(job: str, values: dict[str, Any]) -> None:
    """Check some fields of a specification, each by itself. Raises ValueError."""
    for name, value in values.items():
        field = settings_of(job).model_fields.get(name)
        if field is None:
            raise ValueError(f"{job} has no field {name}")
        of_field: Any = Annotated[field.annotation, field]
        TypeAdapter(of_field).validate_python(value)


def logged_metrics(folder: Path) -> list[tuple[str, set[str]]]:
    """(job, names of its metrics) of every run in the database below `folder`/mlflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [(run.data.tags.get("calumma.job", ""), set(run.data.metrics)) for run in client.search_runs(experiments)]
