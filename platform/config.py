"""Job specifications: what a job does, as one typed YAML file. Everything is checked here, before Ray starts.

Inside a specification every location is a URI (`s3://...`), an absolute path, or a path below `storage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig, ModelConfig


class SpecificationError(ValueError):
    """A specification that cannot run; the message names the field, what was given and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; none: SQLite and local artifacts below ./mlflow")
    experiment: str = "calumma"


class WorkerRange(Section):
    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(Section):
    """What the job asks of the cluster. A range of workers adapts to what there is."""

    workers: Annotated[int, Field(ge=1)] | WorkerRange = 1
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers


class JobSpecification(Section):
    job: str
    storage: str = Field(description="root URI or folder; relative locations are below it")
    tracking: Tracking = Tracking()
    resources: Resources = Resources()
    run_name: str | None = Field(None, description="name of the MLflow run; default: the job's name")
    seed: int = 0

    def locate(self, location: str) -> str:
        """The absolute URI or path of a location named in this specification."""
        if "://" in location or Path(location).is_absolute():
            return location
        return f"{self.storage.rstrip('/')}/{location}"


def last_part(location: str) -> str:
    """The name that a location ends in, of a path or a URI."""
    return location.rstrip("/").rpartition("/")[2]


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


class Source(Section):
    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    format: Literal["webdataset", "jsonl", "interleaved", "conversations"]
    location: str = Field(description="a file, or a prefix whose files are all read")


class CurateSpecification(JobSpecification):
    """Raw files -> checked, ordered documents in Parquet shards, a manifest a source, a report of what was dropped."""

    job: Literal["curate"] = "curate"
    sources: list[Source] = Field(min_length=1)
    output: str = "curated"
    image_first: float = Field(0.5, ge=0, le=1, description="share of image-caption pairs whose image stands first")
    min_text: int = Field(1, ge=0, description="characters; plain-text documents below it are dropped")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="the job fails when more input than this is unreadable")
    documents_per_shard: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := _repeated(source.name for source in self.sources):
            raise ValueError(f"sources: the name {', '.join(twice)} is given more than once; names must differ")
        return self


class TextTokenizerSpecification(JobSpecification):
    """Trains the BPE model over curated documents; writes text_tokenizer.model, vocabulary.json and a manifest."""

    job: Literal["train_text_tokenizer"] = "train_text_tokenizer"
    documents: list[str] = Field(min_length=1)
    output: str = "tokenizers/text"
    vocabulary_size: int = Field(65536, ge=300, description="all ids: special, image codes, bytes, merges")
    image_codes: int = Field(8192, ge=2)
    max_characters: int = Field(100_000_000, ge=1000)


class ImageTokenizerSpecification(JobSpecification):
    """Trains the VQ image tokenizer under Ray Train; writes config.json, model.safetensors and a manifest."""

    job: Literal["train_image_tokenizer"] = "train_image_tokenizer"
    documents: list[str] = Field(min_length=1)
    held_out: list[str] = Field([], description="documents whose images measure the reconstruction error")
    output: str = "tokenizers/image"
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0)
    loss: ImageLossConfig = ImageLossConfig()
    sampling_weight: str | None = Field(
        None,
        description="package.module:function, which gives an image (PIL, RGB) the weight it is drawn with; say 2 where "
        "it finds a face (paper section 2.1). None: all alike",
    )

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if not self.model.decoder:
            raise ValueError("model.decoder must be true: the decoder is trained with the encoder")
        if self.model.resolution < self.loss.smallest:
            raise ValueError(
                f"these losses need images of {self.loss.smallest} pixels, model.resolution is "
                f"{self.model.resolution}: set loss.discriminator_layers lower, or leave the adversarial or the "
                "perceptual loss out"
            )
        return self


class TokenizeSpecification(JobSpecification):
    """Curated documents -> packed token shards. Each entry of `documents` becomes `output/<its last path part>`."""

    job: Literal["tokenize"] = "tokenize"
    documents: list[str] = Field(min_length=1)
    text_tokenizer: str = "tokenizers/text"
    image_tokenizer: str = "tokenizers/image"
    output: str = "tokens"
    context: int = Field(4096, ge=16)
    micro_batch: int = Field(1, ge=1, description="packed sequences a row group, the unit a worker reads")
    micro_batches_per_shard: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := _repeated(last_part(location) for location in self.documents):
            raise ValueError(f"documents: several end in {', '.join(twice)}; their tokens would share a directory")
        return self


class Optimizer(Section):
    """AdamW (paper section 2.3)."""

    learning_rate: float = Field(1e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0)


class Schedule(Section):
    """Linear warm-up, then decay to `final` x the peak over `total_steps` (default: the stage's own steps)."""

    kind: Literal["exponential", "cosine", "constant"] = "exponential"
    warmup_steps: int = Field(4000, ge=0)
    total_steps: int | None = Field(None, ge=1, description="the length of the whole schedule over all stages")
    final: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.kind == "exponential" and self.final == 0:
            raise ValueError("final: an exponential decay never reaches 0; give a small share, say 0.001")
        return self


class TrainSpecification(JobSpecification):
    """One training stage on packed token shards; writes checkpoints and a model directory."""

    mixture: dict[str, float] = Field(min_length=1, description="token shards -> weight")
    held_out: dict[str, str] = Field({}, description="name -> token shards whose loss is measured at the end")
    text_tokenizer: str = "tokenizers/text"
    image_tokenizer: str = "tokenizers/image"
    output: str
    initial: str | None = Field(None, description="output of an earlier stage whose weights this one starts from")
    continue_schedule: bool = Field(False, description="go on with the earlier stage's optimizer and step count")
    model: ModelConfig | None = Field(
        None, description="architecture, or {preset: name} and what differs from it; required without `initial`"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides the model's")
    steps: int = Field(ge=1)
    micro_batches: int = Field(ge=1, description="micro-batches a global batch, whatever the number of workers")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    z_loss: float = Field(1e-5, ge=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    checkpoint_activations: bool = Field(
        False, description="keep only each block's input and compute the rest again: slower, far less memory"
    )
    compile: bool = Field(False, description="torch.compile every block: minutes at the start, faster steps")
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed settings that override ours")
    checkpoint_every: int = Field(1000, ge=1)
    log_every: int = Field(10, ge=1)
    samples: list[str] = Field([], description="prompts whose answers are logged as pictures at the end")
    register_as: str | None = Field(None, description="name in the MLflow model registry")
    alias: str | None = Field(None, description="alias given to the registered version, say `champion`")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.model is None) == (self.initial is None):
            raise ValueError("give exactly one of `model` (train from scratch) and `initial` (start from a stage)")
        if self.continue_schedule and self.initial is None:
            raise ValueError("`continue_schedule` needs `initial`")
        if self.alias and not self.register_as:
            raise ValueError("`alias` needs `register_as`")
        bad = {k: v for k, v in self.mixture.items() if v <= 0}
        if bad:
            raise ValueError(f"mixture weights must be above 0, found {bad}")
        return self


class PretrainSpecification(TrainSpecification):
    """Pre-training on a mixture of packed token shards, stage 1 or 2 (paper section 2); writes a model directory."""

    job: Literal["pretrain"] = "pretrain"


class FinetuneSpecification(TrainSpecification):
    """Supervised fine-tuning on packed conversations, the loss on answers only (paper section 3)."""

    job: Literal["finetune"] = "finetune"
    schedule: Schedule = Schedule(kind="cosine", warmup_steps=0)
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)


class EvaluationTask(Section):
    """`recognition`: image -> word. `generation`: word -> image, judged. `interleaved`: both in turn, judged."""

    name: str
    kind: Literal["recognition", "generation", "interleaved"]
    documents: str = Field(
        description="curated conversations: the user's turn is the prompt, the assistant's the answer"
    )
    limit: int | None = Field(None, ge=1)


class EvaluateSpecification(JobSpecification):
    """A model's answers to held-out conversations, judged by their words and by an independent classifier."""

    job: Literal["evaluate"] = "evaluate"
    model: str = Field(description="model directory, or models:/name@alias")
    tasks: list[EvaluationTask] = Field(min_length=1)
    judge_training: str = Field(description="curated images with captions as labels: trains the independent classifier")
    judge_held_out: str = Field(description="the same, held out: measures the classifier itself")
    batch: int = Field(32, ge=1, description="sequences generated at once")
    output: str = "evaluation"


JOBS: dict[str, type[JobSpecification]] = {
    "curate": CurateSpecification,
    "train_text_tokenizer": TextTokenizerSpecification,
    "train_image_tokenizer": ImageTokenizerSpecification,
    "tokenize": TokenizeSpecification,
    "pretrain": PretrainSpecification,
    "finetune": FinetuneSpecification,
    "evaluate": EvaluateSpecification,
}
S = TypeVar("S", bound=JobSpecification)


def read(kind: type[S], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """A specification from a YAML file and `a.b=value` overrides (values are YAML). Raises SpecificationError."""
    path = Path(file)
    try:
        if not path.is_file():
            raise SpecificationError(f"there is no specification file {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecificationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecificationError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); is it a YAML file? Save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise SpecificationError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecificationError(f"{path} must hold a mapping of fields, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(kind, values, str(path))


def validate(kind: type[S], values: dict[str, Any], origin: str) -> S:
    """Check plain values against a specification. Raises SpecificationError, one line for each wrong field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, e) for e in error.errors()]
        raise SpecificationError("\n".join([f"{origin}:", *(f"  {line}" for line in lines)])) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecificationError(f"override {override!r} must look like field.subfield=value")
    *parents, last = path.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise SpecificationError(f"override {override!r}: {parent!r} holds a value, not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecificationError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _explain(kind: type[BaseModel], error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(kind, error["loc"][:-1])
        return f"{location}: unknown field (given {given!r}); allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{location}: required, and not given"
    shown = "" if isinstance(given, dict) else f" (given {given!r})"
    return f"{location}: {error['msg']}{shown}"


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
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found += _models_in(inner)
    return found
