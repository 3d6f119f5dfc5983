"""Evaluation of a model directory: Ray actors answer the cases of every task, the judge grades the answers.

Each actor holds the model and generates in batches; an actor lost with its node is started again and repeats its share.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from calumma.model.document import Document, Text
from calumma.model.generation.request import Mode
from calumma.platform.cluster.progress import Progress
from calumma.platform.evaluation.judge import Judge
from calumma.platform.evaluation.likeness import Likeness
from calumma.platform.evaluation.specification import EvaluateSpecification, EvaluationTask
from calumma.platform.evaluation.tasks import Case, Grade, Kind, grade, make_case, summary, texts_and_images
from calumma.platform.reports.contact_sheet import Cell, contact_sheet
from calumma.platform.specification import Tracking

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from calumma.model.generation import SamplingParams
    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run

MOST_CELLS = 100  # pictures on a contact sheet, at most
COLUMNS = 10
MODES: dict[Kind, Mode] = {"recognition": "text", "generation": "image", "interleaved": "interleaved"}
SPARE_TOKENS = 16  # ids an answer may be longer than the expected one


def evaluate(spec: EvaluateSpecification, run: Run, progress: Progress) -> Manifest:
    """Run all tasks; metrics and contact sheets go to the run, answers and sheets to `spec.output`.

    Raises JudgeDataError, InvalidCase, StorageError, TrackingError, SpecificationError.
    """
    from calumma.platform import storage
    from calumma.platform.storage.manifest import FileEntry, Manifest
    from calumma.platform.tracking.fingerprints import fingerprints

    # Taken before anything is read, so that the next call notices what changes from here on.
    read_from = [task.documents for task in spec.tasks] + [spec.judge_training, spec.judge_held_out]
    read_from += [spec.training_pictures] if spec.training_pictures else []
    inputs = fingerprints([_model_uri(spec), *map(spec.locate, read_from)], spec.tracking)
    progress(0, 1, "judge")
    parts = spec.judge.parts
    judge = Judge.train(_labelled_images(spec.locate(spec.judge_training)), spec.judge.features, max(1, len(parts)))
    metrics = _judged(judge, _labelled_images(spec.locate(spec.judge_held_out)), parts)
    likeness = _likeness(spec.locate(spec.training_pictures)) if spec.training_pictures else None
    tasks = {task.name: _cases(task, spec) for task in spec.tasks}
    answers = iter(_answers(spec, [c for cases in tasks.values() for c in cases], progress))

    output = spec.locate(spec.output)
    entries: list[FileEntry] = []

    def publish(path: str, data: bytes, rows: int) -> None:
        storage.write_bytes(storage.join(output, path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=rows))

    for task in spec.tasks:
        cases = tasks[task.name]
        task_answers = [next(answers) for _ in cases]
        grades = [grade(c, a, judge.classify) for c, a in zip(cases, task_answers, strict=True)]
        measures = summary(task.kind, grades, parts)
        if likeness and task.kind == "generation":
            measures |= _compared(likeness, cases, task_answers)
        metrics |= {f"{task.name}_{key}": value for key, value in measures.items()}
        publish(f"{task.name}.jsonl", _lines(cases, grades), len(cases))
        sheet = _sheet(cases, task_answers, grades)
        run.log_image(sheet, f"evaluation/{task.name}.png")
        publish(f"{task.name}.png", _png(sheet), 0)
    run.log_metrics(metrics)
    report = {**metrics, "run": run.id, "cases": {name: len(cases) for name, cases in tasks.items()}}
    manifest = Manifest(
        kind="evaluation", files=entries, specification=spec.model_dump(mode="json"), report=report, inputs=inputs
    )
    manifest.write(output)
    return manifest


def sampling_params(case: Case, seed: int, image_length: int, expected_tokens: int) -> SamplingParams:
    """Words are taken greedily, pictures sampled with the paper's guidance; an answer may be a little too long."""
    from calumma.model.generation import PhaseSampling, SamplingParams

    mode = MODES[case.kind]
    return SamplingParams(
        mode=mode,
        max_tokens=expected_tokens + SPARE_TOKENS + (image_length + 2 if mode == "interleaved" else 0),
        max_images=len(case.words) + 1,
        text=PhaseSampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0),
        seed=seed,
    )


class AnsweringActor:
    """Holds a model and answers cases; runs as a Ray actor."""

    def __init__(self, model: str, tracking: Tracking, batch: int, threads: int) -> None:
        import torch

        from calumma.model import load
        from calumma.platform.tracking.registry import resolve_model

        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with ExitStack() as stack:
            self._model = load(stack.enter_context(resolve_model(model, tracking)), device=device)
        self._batch = batch

    def answer(self, cases: list[Case], seeds: list[int]) -> list[dict[str, Any]]:
        """Answers as table rows (`Document.to_row`), in order."""
        from calumma.model import generate

        length = self._model.image_length
        expected = self._model.encoder.encode_many([c.expected for c in cases])
        params = [
            sampling_params(c, seed, length, len(e.ids)) for c, seed, e in zip(cases, seeds, expected, strict=True)
        ]
        answers = generate(self._model, [c.prompt for c in cases], params, max_sequences=self._batch)
        return [answer.to_row() for answer in answers]


def _answers(spec: EvaluateSpecification, cases: list[Case], progress: Progress) -> Iterator[Document]:
    """The model's answers, in order, from as many actors as the cluster has room for."""
    import ray
    from ray.util import ActorPool

    from calumma.platform.cluster import capacity

    workers = min(capacity.require_workers(spec.resources), max(1, len(cases) // spec.batch))
    resources = spec.resources
    actor: Any = ray.remote(AnsweringActor).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_restarts=2, max_task_retries=2
    )
    threads = max(1, round(resources.cpus_per_worker))
    actors = [actor.remote(_model_uri(spec), spec.tracking, spec.batch, threads) for _ in range(workers)]
    chunks = [list(range(i, min(i + 2 * spec.batch, len(cases)))) for i in range(0, len(cases), 2 * spec.batch)]
    progress(0, len(cases), f"loading the model in {workers} workers")
    done = 0
    try:
        results = ActorPool(actors).map(
            lambda a, chunk: a.answer.remote([cases[i] for i in chunk], [spec.seed + i for i in chunk]), chunks
        )
        for rows in results:
            done += len(rows)
            progress(done, len(cases), "answers")
            yield from (Document.from_row(row) for row in rows)
    finally:
        for a in actors:
            ray.kill(a)


def _model_uri(spec: EvaluateSpecification) -> str:
    """The model's URI: of the registry as it is, any other below the storage."""
    return spec.model if spec.model.startswith("models:") else spec.locate(spec.model)


def _cases(task: EvaluationTask, spec: EvaluateSpecification) -> list[Case]:
    from itertools import islice

    from calumma.platform.shards.documents import read_documents

    documents = islice(read_documents(spec.locate(task.documents)), task.limit)
    return [make_case(task.kind, document) for document in documents]


def _judged(judge: Judge, labelled: list[tuple[PILImage.Image, str]], parts: Sequence[str]) -> dict[str, float]:
    """The judge itself: the share of pictures it is right about, and about each part of their labels."""
    marks = judge.marks(labelled)
    whole = {"judge_accuracy": sum(map(all, marks)) / len(marks)}
    if len(parts) < 2:
        return whole
    return whole | {f"judge_{part}": sum(m[i] for m in marks) / len(marks) for i, part in enumerate(parts)}


def _likeness(uri: str) -> Likeness:
    return Likeness([picture for picture, _ in _labelled_images(uri)])


def _compared(likeness: Likeness, cases: Sequence[Case], answers: Sequence[Document]) -> dict[str, float]:
    drawn = [image.open() for answer in answers for image in answer.images[:1]]
    real = [image.open() for case in cases for image in case.expected.images[:1]]
    return likeness.measure(drawn, real)


def _labelled_images(uri: str) -> list[tuple[PILImage.Image, str]]:
    """Pictures with their captions, of documents that have both."""
    from calumma.platform.shards.documents import read_documents

    return [(i.open(), i.caption) for document in read_documents(uri) for i in document.images if i.caption]


def _lines(cases: Sequence[Case], grades: Sequence[Grade]) -> bytes:
    rows = [
        {"question": c.prompt.text.strip(), "expected": " ".join(c.words), "said": m.answer, "right": m.right}
        for c, m in zip(cases, grades, strict=True)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _sheet(cases: Sequence[Case], answers: Sequence[Document], grades: Sequence[Grade]) -> PILImage.Image:
    """Recognition shows what was asked about, the other kinds what was drawn; an even choice of all cases."""
    cells: list[Cell] = []
    for i in range(0, len(cases), max(1, len(cases) // MOST_CELLS)):
        if cases[i].kind == "recognition":
            cells += [Cell(image.open(), grades[i].answer, grades[i].right) for image in cases[i].prompt.images[:1]]
        elif cases[i].kind == "generation":
            cells += [Cell(p.open(), cases[i].words[0], grades[i].right) for p in answers[i].images[:1]]
        else:
            cells += _interleaved_cells(answers[i], grades[i])
    return contact_sheet(cells[:MOST_CELLS], COLUMNS)


def _interleaved_cells(answer: Document, graded: Grade) -> list[Cell]:
    cells: list[Cell] = []
    text = ""
    for piece in texts_and_images(answer):
        if isinstance(piece, Text):
            text = piece.text.strip()
        else:
            right = graded.digits[len(cells)] if len(cells) < len(graded.digits) else False
            cells.append(Cell(piece.open(), text, right))
    return cells


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
