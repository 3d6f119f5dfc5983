"""What follows training: the model directory in storage, and sample answers; and a checkpoint as a model in MLflow.

One worker does it, with all weights in its host's memory.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calumma.model.document import Document, Text
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.platform.storage.manifest import MANIFEST, Manifest
from calumma.platform.tracking import provenance
from calumma.platform.tracking.outbox import BackgroundWriter
from calumma.platform.training import samples
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.trainable import parameters

if TYPE_CHECKING:
    from calumma.platform.training.assignment import Assignment

MODEL_FOLDER = "model"  # folder of the model directory in a stage's output


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
    assignment: Assignment, worker: Worker, weights: dict[str, Tensor], report: dict[str, Any], writer: BackgroundWriter
) -> None:
    """Write the model directory to storage, its manifest last, and log sample answers."""
    spec = assignment.spec
    uri = storage.join(assignment.output, MODEL_FOLDER)
    with _model_directory(assignment, weights) as local:
        files = sorted(path for path in local.rglob("*") if path.is_file())
        entries = [catalog.local_entry(path, str(local)) for path in files]
        storage.delete(storage.join(uri, MANIFEST))
        storage.upload(str(local), uri)
        Manifest(
            kind=MODEL_FOLDER,
            files=entries,
            specification=spec.model_dump(mode="json"),
            report=report,
            inputs=assignment.inputs,
        ).write(uri)
        if spec.samples:
            _log_answers(assignment, worker, local, writer, "")


def log_samples(
    assignment: Assignment, worker: Worker, weights: dict[str, Tensor], writer: BackgroundWriter, done: int
) -> None:
    """Sample answers of the weights after `done` steps."""
    with _model_directory(assignment, weights) as local:
        _log_answers(assignment, worker, local, writer, f"step-{done:08d}")


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


def _log_answers(assignment: Assignment, worker: Worker, local: Path, writer: BackgroundWriter, folder: str) -> None:
    """Answers to the specification's prompts: a picture of each below samples/, their texts below answers/."""
    from calumma.model import load

    spec = assignment.spec
    model = load(local, worker.device)
    answers = samples.sample_answers(model, spec.samples, spec.job == "finetune", spec.seed)
    for number, (prompt, answer) in enumerate(zip(spec.samples, answers, strict=True)):
        writer.log_image(samples.render_answer(prompt, answer), storage.join("samples", folder, f"{number:02d}.png"))
    records = [
        {"prompt": prompt, "answer": _segment_texts(answer)}
        for prompt, answer in zip(spec.samples, answers, strict=True)
    ]
    writer.log_dict({"samples": records}, f"answers/{folder or 'end'}.json")


def _segment_texts(answer: Document) -> list[str]:
    return [segment.text if isinstance(segment, Text) else "(image)" for segment in answer.segments]
