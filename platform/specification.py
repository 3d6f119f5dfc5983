"""What every job specification is made of: sections, resources, tracking, and the errors that a wrong one raises.

A room's own specification stands in the room. Inside a specification every location is a URI (`s3://...`), an absolute
path, or a path below `storage`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class SpecificationError(ValueError):
    """A specification that cannot run; the message names the field, what was given and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tracking(Section):
    """Where MLflow records the job, and what mirrors the metrics of a training beside it."""

    uri: str | None = Field(None, description="MLflow tracking URI; none: SQLite and local artifacts below ./mlflow")
    experiment: str = Field("calumma", description="MLflow experiment of the run")
    project: str | None = Field(
        None, min_length=1, description="MLflow run below which those of all jobs with this project stand"
    )
    tensorboard: str | None = Field(
        None, min_length=1, description="folder of TensorBoard's event files, too, one below it a run; none: off"
    )
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases, too, by its client's own settings; none: off"
    )


class WorkerRange(Section):
    min: int = Field(ge=1, description="fewest to start and to go on with")
    max: int = Field(ge=1, description="most that are used when the cluster has them")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Recovery(Section):
    """How training goes on when workers fail, hang, or nodes join and leave."""

    restarts: int = Field(
        3, ge=0, description="failures of workers without a new checkpoint in between, after which the run ends"
    )
    hang_seconds: float = Field(1800, gt=0, description="a worker without progress for so long is ended")
    resize_seconds: float = Field(60, gt=0, description="how often a range of workers looks for nodes that joined")
    stop_seconds: float = Field(
        120,
        gt=0,
        description="how long the checkpoint on SIGTERM, Ctrl-C or before a resize may take; three times what the last "
        "one took where that is longer",
    )
    copy_every: int | None = Field(
        None,
        ge=1,
        description="steps between two copies of the training state in the memory of its host and of another, from "
        "which a group that has lost workers goes on; null: it goes on from the newest checkpoint",
    )
    node_local: str | None = Field(
        None,
        description="folder on every host's own disk that keeps what its workers write of the newest two checkpoints: "
        "they read it there when they start again; null: from storage",
    )
    spares: bool = Field(
        False,
        description="a process on every host that has imported everything, to take the place of a lost worker; where "
        "workers have no GPUs",
    )
    lease_seconds: float = Field(
        60, gt=0, description="how long an output stays the run's that has it when nothing is heard of that run"
    )

    @property
    def collective_seconds(self) -> int:
        """How long workers wait for each other in a collective: who waits for one that hangs must not fail before the
        watchdog ends that."""
        return max(1800, round(1.5 * self.hang_seconds))


class Retention(Section):
    """Which checkpoints of a stage stay in storage; one reason is enough."""

    last: int = Field(3, ge=1, description="the newest ones")
    every: int | None = Field(None, ge=1, description="those whose step is a multiple of it")
    best: int = Field(0, ge=0, description="those with the lowest loss")
    when_full: Literal["fail", "prune"] = Field(
        "fail",
        description="where a disk has no room for the next: fail: it is not written, and three in a row end the run. "
        "prune: all but the newest are deleted first",
    )


class Resources(Section):
    """What the job asks of the cluster. A range of workers grows and shrinks with it while training runs."""

    workers: Annotated[int, Field(ge=0)] | WorkerRange = Field(
        1,
        description="0: in the job's own process, without a cluster (curate, tokenize, evaluate, evaluate_suite, "
        "ablate and ladder)",
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="logical CPUs, or a fraction")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs; training takes whole ones")
    accelerator: str | None = Field(
        None, description="kind of GPU that training's workers take, by Ray's name for it, say H100; none: any"
    )
    recovery: Recovery = Recovery()
    keep: Retention = Retention()

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers


# Jobs that need no cluster when resources.workers is 0.
IN_PROCESS = ("curate", "tokenize", "tokenize_preferences", "evaluate", "evaluate_suite", "ablate", "ladder")


class JobSpecification(Section):
    job: str
    storage: str = Field(description="root URI or folder; relative locations are below it")
    tracking: Tracking = Tracking()
    resources: Resources = Resources()
    run_name: str | None = Field(None, description="name of the MLflow run; default: the job's name")
    seed: int = Field(0, description="of everything that is drawn: the same seed, the same result")

    @model_validator(mode="after")
    def _workers(self) -> Self:
        if self.resources.workers == 0 and self.job not in IN_PROCESS:
            raise ValueError(
                f"resources.workers: 0, which is work without a cluster, is for {', '.join(IN_PROCESS)} alone; "
                f"give {self.job} at least 1"
            )
        return self

    def locate(self, location: str) -> str:
        """The absolute URI or path of a location named in this specification."""
        if "://" in location or Path(location).is_absolute():
            return location
        return f"{self.storage.rstrip('/')}/{location}"

    @property
    def output_uri(self) -> str:
        """Where the job's result and manifest are: the absolute URI or path of `output`."""
        return self.locate(str(self.model_dump(include={"output"})["output"]))

    @property
    def checkpoints(self) -> str:
        """The folder of the checkpoints that an unfinished run is resumed from."""
        return f"{self.output_uri.rstrip('/')}/checkpoints"


def basename(location: str) -> str:
    """The name that a location ends in, of a path or a URI."""
    return location.rstrip("/").rpartition("/")[2]


def repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


S = TypeVar("S", bound=JobSpecification)
M = TypeVar("M", bound=BaseModel)


def validate(
    kind: type[M], values: dict[str, Any], origin: str, places: Mapping[tuple[str | int, ...], str] | None = None
) -> M:
    """Check plain values against a specification. Raises SpecificationError, one line for each wrong field.

    `places`: where in `origin` a field was given (its keys and indices from the top -> `line 3`).
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"{_place(e['loc'], places or {})}{_explain(kind, e)}" for e in error.errors()]
        raise SpecificationError("\n".join([f"{origin}:", *(f"  {line}" for line in lines)])) from error


def _place(location: tuple[str | int, ...], places: Mapping[tuple[str | int, ...], str]) -> str:
    """Where a wrong field, or what is nearest around it, was given: `line 3: `; empty when that is not known."""
    for end in range(len(location), 0, -1):
        if location[:end] in places:
            return f"{places[location[:end]]}: "
    return ""


def _explain(kind: type[BaseModel], error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(kind, error["loc"][:-1])
        return f"{location}: unknown field (given {value!r}); allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{location}: required, and not given"
    shown = "" if isinstance(value, dict) else f" (given {value!r})"
    if error["type"] == "string_type" and isinstance(value, bool):
        shown += "; YAML reads yes, no, on and off as truth values: quote the word"
    return f"{location}: {error['msg'].removeprefix('Value error, ')}{shown}"


def _fields_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields allowed at a location, found by walking the annotations."""
    models: list[type[BaseModel]] = [kind]
    for part in location:
        if not isinstance(part, str):
            continue
        inner: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                inner += _models_in(model.model_fields[part].annotation)
        models = inner or models
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        models += _models_in(inner)
    return models


def import_function(path: str, field: str) -> Callable[..., Any]:
    """The function behind a name. Raises SpecificationError, which names the field, when there is none."""
    module, separator, name = path.partition(":")
    if not separator or not module or not name:
        raise SpecificationError(f"{field}: {path!r} must look like package.module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecificationError(f"{field}: there is no {path!r} on this machine: {error}") from error
    if not callable(function):
        raise SpecificationError(f"{field}: {path!r} is no function but {type(function).__name__}")
    return function


def with_absolute_storage(spec: S) -> S:
    """The specification with its local storage root made absolute: workers stand in other working directories."""
    if "://" in spec.storage:
        return spec
    return spec.model_copy(update={"storage": str(Path(spec.storage).expanduser().absolute())})
