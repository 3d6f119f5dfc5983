"""What a training's specification leaves to its inputs, found without running anything: architecture, size of the
vocabulary, sequences of a micro-batch. Looked for in the specifications beside it, then in storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from calumma.jobs.specifications.reading import read_specification
from calumma.jobs.specifications.table import JOBS
from calumma.model.config import FILE, ModelConfig, preset
from calumma.model.vocabulary import FILE as VOCABULARY
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.specification import JobSpecification, SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.specification import TextTokenizerSpecification, TokenizeSpecification
from calumma.platform.training.forecast.forecast import Training
from calumma.platform.training.specification import TrainSpecification


def read_any(file: str | Path, overrides: tuple[str, ...] = ()) -> JobSpecification:
    """A specification of whatever job its `job` names. Raises SpecificationError."""
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = {}  # which the reading below says better
    job = values.get("job") if isinstance(values, dict) else None
    if job not in JOBS and values:
        raise SpecificationError(f"{file}: `job` is {job!r}; jobs are: {', '.join(JOBS)}")
    return read_specification(JOBS.get(str(job), JobSpecification), file, overrides)


def settled_training(
    spec: TrainSpecification, file: Path, model: str | None = None, micro_batch: int | None = None
) -> Training:
    """With what the command's options say before all else. Raises SpecificationError that names the option."""
    beside = list(_beside(file))
    config = _given(model) if model else _architecture(spec, beside)
    if not config.vocabulary_size:
        config = config.model_copy(update={"vocabulary_size": _vocabulary_size(spec, beside)})
    if spec.dropout is not None:
        config = config.model_copy(update={"dropout": spec.dropout})
    return Training(spec, config, micro_batch or _micro_batch(spec, beside))


def _given(model: str) -> ModelConfig:
    try:
        return preset(model)
    except KeyError as error:
        raise SpecificationError(f"--model: {error.args[0]}") from error


def _beside(file: Path) -> Iterator[JobSpecification]:
    """The other valid specifications of a folder."""
    for other in sorted(file.parent.glob("*.yaml")):
        try:
            yield read_any(other)
        except SpecificationError:
            continue


def _architecture(spec: TrainSpecification, beside: list[JobSpecification]) -> ModelConfig:
    if spec.model is not None:
        return spec.model
    assert spec.initial is not None  # the specification has checked it
    place = spec.locate(spec.initial)
    for other in beside:
        if isinstance(other, TrainSpecification) and other.output_uri == place and other.output != spec.output:
            return _architecture(other, beside)
    for uri in (storage.join(place, "model", FILE), storage.join(place, FILE)):
        if (found := _read(uri)) is not None:
            return ModelConfig.model_validate_json(found)
    raise SpecificationError(
        f"initial: neither a specification beside this one makes {place}, nor is it in storage: name its architecture "
        "with --model chameleon-7b, say"
    )


def _vocabulary_size(spec: TrainSpecification, beside: list[JobSpecification]) -> int:
    place = spec.locate(spec.text_tokenizer)
    if (found := _read(storage.join(place, VOCABULARY))) is not None:
        return Vocabulary.model_validate_json(found).size
    for other in beside:
        if isinstance(other, TextTokenizerSpecification) and other.output_uri == place:
            return other.vocabulary_size
    raise SpecificationError(
        f"model.vocabulary_size: it is that of {place}, which is not there yet; say --set model.vocabulary_size=65536"
    )


def _micro_batch(spec: TrainSpecification, beside: list[JobSpecification]) -> int:
    for other in beside:
        if isinstance(other, TokenizeSpecification) and other.storage == spec.storage:
            return other.micro_batch
    for uri in spec.mixture:
        if (found := _read(storage.join(spec.locate(uri), "manifest.json"))) is not None:
            manifest = Manifest.model_validate_json(found)
            return max((file.sequences(0) for file in manifest.files if file.row_groups), default=1)
    raise SpecificationError(
        "micro_batches: neither a tokenize.yaml beside this specification nor token shards in storage say how many "
        "sequences a micro-batch has; say so with --micro-batch"
    )


def _read(uri: str) -> bytes | None:
    """An object's content; none where it is not there, or storage is not."""
    try:
        return storage.read_bytes(uri)
    except storage.StorageError:
        return None
