"""What follows training: the model directory in storage; what the model answers, while it trains and at its end; and a
checkpoint as a model in MLflow.

One worker publishes, with all weights in its host's memory. Answers come from the weights where they are, on all
workers: no second model is loaded beside them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calumma.model.adapters.files import FOLDER as ADAPTER_FOLDER
from calumma.model.adapters.files import write_adapter
from calumma.model.directory import MixedModalModel
from calumma.model.document import Document, Text
from calumma.model.encoding import DocumentEncoder
from calumma.model.generation.passes.streamed import StreamedDecoder
from calumma.model.loading import described
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.platform.storage.manifest import MANIFEST, Manifest
from calumma.platform.tracking import provenance
from calumma.platform.tracking.writer import BackgroundWriter
from calumma.platform.training import samples
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.trainable import parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from calumma.platform.training.assignment import Assignment

MODEL_FOLDER = "model"  # folder of the model directory in a stage's output


def log_inputs(assignment: Assignment, worker: Worker, writer: BackgroundWriter) -> None:
    """What the run is made of: code, environment, data and parent."""
    spec = assignment.spec
    writer.log_dict(provenance.environment() | {"workers": worker.world}, "environment.json")
    data = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
    for place, weight in data.items():
        if (manifest := Manifest.find(place)) is not None:
            summary = manifest.model_dump(mode="json", exclude={"files"}) | {"files": len(manifest.files)}
            record = {"uri": place, "fingerprint": assignment.inputs.get(place), "weight": weight, "manifest": summary}
            writer.log_dict(record, f"data/{place.rstrip('/').rpartition('/')[2]}.json")
    others = {uri: mark for uri, mark in assignment.inputs.items() if uri not in data}
    writer.log_data({uri: mark for uri, mark in assignment.inputs.items() if uri in data}, "training")
    if others:
        writer.log_data(others, "starting point and tokenizers")


def log_checkpoint(writer: BackgroundWriter, uri: str, report: dict[str, Any], names: Iterable[str]) -> None:
    """A checkpoint is in storage: a model of the run's in MLflow, with the metrics of its report that have `names`."""
    done = int(report["step"])
    values = {key: value for key, value in report.items() if key not in ("faults", "groups")}
    writer.log_dict({"uri": uri, **values}, f"checkpoints/step-{done:08d}.json")
    metrics = {name: float(report[name]) for name in names if math.isfinite(report.get(name, math.nan))}
    tags = {"calumma.schedule_step": str(report["schedule_step"])} | provenance.commit()
    writer.log_checkpoint(f"step-{done:08d}", uri, done, metrics, tags)
    writer.log({"checkpoint_step": done}, done)
    writer.back_up()


def publish_model(
    assignment: Assignment, weights: dict[str, Tensor], report: dict[str, Any], beat: Callable[[], object]
) -> None:
    """Write the model directory, and adapters, to storage, manifests last. `beat` is called as it goes on."""
    spec = assignment.spec
    uri = storage.join(assignment.output, MODEL_FOLDER)
    with _model_directory(assignment, weights) as local:
        files = sorted(path for path in local.rglob("*") if path.is_file())
        entries = []
        assignment.run.check_output()
        storage.delete(storage.join(uri, MANIFEST))
        for path in files:
            entries.append(catalog.local_entry(path, str(local)))
            storage.upload(path, storage.join(uri, entries[-1].path))
            beat()
        assignment.run.check_output()
        Manifest(
            kind=MODEL_FOLDER,
            files=entries,
            specification=spec.model_dump(mode="json"),
            report=report,
            inputs=assignment.inputs,
        ).write(uri)
    if spec.lora is not None:
        _publish_adapter(assignment, weights)


def _publish_adapter(assignment: Assignment, weights: dict[str, Tensor]) -> None:
    """What was trained, as PEFT reads it, with a manifest."""
    spec = assignment.spec
    assert spec.lora is not None
    uri = storage.join(assignment.output, ADAPTER_FOLDER)
    adapter = parameters.adapter_of(weights, spec, assignment.vocabulary)
    with tempfile.TemporaryDirectory(prefix="calumma-adapter-") as local:
        folder = Path(local) / ADAPTER_FOLDER
        write_adapter(folder, adapter, spec.initial, spec.lora.dropout, spec.lora.rank_stabilized)
        storage.delete(uri)
        storage.upload(str(folder), uri)
        entries = [catalog.local_entry(path, str(folder)) for path in sorted(folder.iterdir())]
    Manifest(
        kind=ADAPTER_FOLDER, files=entries, specification=spec.model_dump(mode="json"), inputs=assignment.inputs
    ).write(uri)


def log_samples(
    assignment: Assignment,
    engine: DeepSpeedEngine,
    writer: BackgroundWriter | None,
    done: int | None,
    beat: Callable[[], object],
) -> None:
    """Sample answers of the weights after `done` steps (none: at the end). Every worker calls it; the first has a
    writer. A picture of each answer goes below samples/, their texts below answers/."""
    spec, folder = assignment.spec, "" if done is None else f"step-{done:08d}"
    model, decoder = _answering(assignment, engine)
    answers = samples.sample_answers(model, spec.samples, spec.job == "finetune", spec.seed, decoder, beat)
    if writer is None:
        return
    _log_answers(spec, answers, writer, folder)


def log_evaluation(
    assignment: Assignment,
    engine: DeepSpeedEngine,
    writer: BackgroundWriter | None,
    done: int,
    beat: Callable[[], object],
) -> None:
    """Measures of the specification's tasks after `done` steps. Every worker calls it; the first has a writer. Raises
    as `evaluate`."""
    from calumma.platform.training.evaluation import evaluate

    model, decoder = _answering(assignment, engine)
    found = evaluate(model, assignment.spec, decoder, beat, graded=writer is not None)
    if writer is not None:
        writer.log({f"evaluation/{name}": value for name, value in found.items()}, done)


def _answering(assignment: Assignment, engine: DeepSpeedEngine) -> tuple[MixedModalModel, StreamedDecoder]:
    """The stage's tokenizers beside a Transformer without memory, and what decodes with the engine's weights."""
    weights = samples.TrainedWeights(engine, assignment.spec, assignment.vocabulary)
    return _tokenizers(assignment, engine.device), StreamedDecoder(assignment.config, weights, engine.device)


def _tokenizers(assignment: Assignment, device: torch.device) -> MixedModalModel:
    """The stage's tokenizers beside a Transformer without memory."""
    spec = assignment.spec
    with (
        storage.local_copy(spec.locate(spec.text_tokenizer)) as text_tokenizer,
        storage.local_copy(spec.locate(spec.image_tokenizer)) as image_tokenizer,
    ):
        encoder = DocumentEncoder(
            assignment.vocabulary, TextTokenizer.read(text_tokenizer), ImageTokenizer.read(image_tokenizer, device)
        )
    return MixedModalModel(described(assignment.config), encoder)


@contextmanager
def _model_directory(assignment: Assignment, weights: dict[str, Tensor]) -> Iterator[Path]:
    """A temporary model directory of an ordinary Transformer with these weights."""
    from calumma.model.directory import save_model

    spec = assignment.spec
    plain = parameters.plain_weights(weights, spec, assignment.vocabulary)
    transformer = Transformer(assignment.config).to(next(iter(plain.values())).dtype)
    transformer.load_state_dict(plain)
    with (
        tempfile.TemporaryDirectory(prefix="calumma-model-") as local,
        storage.local_copy(spec.locate(spec.text_tokenizer)) as text_tokenizer,
        storage.local_copy(spec.locate(spec.image_tokenizer)) as image_tokenizer,
    ):
        save_model(local, transformer, text_tokenizer, image_tokenizer)
        yield Path(local)


def _log_answers(spec: TrainSpecification, answers: list[Document], writer: BackgroundWriter, folder: str) -> None:
    for number, (prompt, answer) in enumerate(zip(spec.samples, answers, strict=True)):
        writer.log_image(samples.render_answer(prompt, answer), storage.join("samples", folder, f"{number:02d}.png"))
    records = [
        {"prompt": prompt, "answer": _segment_texts(answer)}
        for prompt, answer in zip(spec.samples, answers, strict=True)
    ]
    writer.log_dict({"samples": records}, f"answers/{folder or 'end'}.json")


def _segment_texts(answer: Document) -> list[str]:
    return [segment.text if isinstance(segment, Text) else "(image)" for segment in answer.segments]
