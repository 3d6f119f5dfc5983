"""A suite's run: all data checked, then task after task asked, graded, and written down.

Invariants: no model is loaded before every task's data was read; a finished task is not measured again while what it
was measured from is the same; answers are written before they are graded, a part at a time, so that neither a kill nor
a judge that is away loses any. The manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from calumma.model.document import Image
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.evaluation.benchmarks import conversations, drawing, safety
from calumma.platform.evaluation.benchmarks.items import Answers, Item, Measured, dialogue, shown
from calumma.platform.evaluation.judges.kinds import Judge, open_judge
from calumma.platform.evaluation.judges.specification import JudgeSpecification
from calumma.platform.evaluation.suite import presets
from calumma.platform.evaluation.suite.preparing import Prepared, judges_of, prepare, read_from, unable
from calumma.platform.evaluation.suite.results import (
    TASKS,
    Sample,
    SuiteResults,
    TaskResult,
    Verdict,
    read_answers,
    write_answers,
    write_verdicts,
)
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.evaluation.systems.opening import open_system
from calumma.platform.evaluation.systems.prompts import Answer, Prompt, System
from calumma.platform.reports.templates import data_url

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import FileEntry, Manifest
    from calumma.platform.tracking.run import Run

PART = 256  # answers that a kill may cost
SHOWN = 6  # samples of a task on the page
THUMBNAIL = 160
PLACES = ("policy", "location", "training", "held_out")  # of a judge


def evaluate_suite(spec: SuiteSpecification, run: Run, progress: Progress) -> Manifest:
    """Raises what `measure` raises."""
    from calumma.platform.storage.manifest import Manifest

    found, files, inputs = measure(spec, run, progress)
    metrics = metrics_of(found.tasks)
    run.log_metrics(metrics)
    report = {**metrics, "run": run.id, "left_out": found.left_out}
    values = spec.model_dump(mode="json")
    manifest = Manifest(kind="suite", files=files, specification=values, report=report, inputs=inputs)
    manifest.write(spec.output_uri)
    return manifest


def metrics_of(tasks: Sequence[TaskResult]) -> dict[str, float]:
    """By the names they have in MLflow."""
    return {f"{one.name}/{name}": value for one in tasks for name, value in one.metrics.items()}


def measure(
    spec: SuiteSpecification, run: Run, progress: Progress
) -> tuple[SuiteResults, list[FileEntry], dict[str, str]]:
    """All tasks' figures, the files that were written below the output, and fingerprints of what was read.

    Raises BenchmarkDataError, SpecificationError, UnusableSystem, JudgeDataError, StorageError, TrackingError."""
    from calumma.platform.evaluation.suite.report import PAGE, RESULTS, write_page
    from calumma.platform.storage.manifest import FileEntry, file_entries
    from calumma.platform.tracking.fingerprints import fingerprints

    output = spec.output_uri
    inputs = fingerprints(read_from(spec), spec.tracking)
    prepared, left_out = prepare(spec, progress)
    held = _contamination(spec, prepared, progress)
    with ExitStack() as stack:
        runner = _Runner(spec, output, stack, progress, len(prepared), inputs)
        unable = runner.unable(prepared)
        prepared, left_out = [one for one in prepared if one.task.name not in unable], {**left_out, **unable}
        results = [runner.result(number, one, held.get(one.task.name)) for number, one in enumerate(prepared)]
    found = SuiteResults(system=spec.system.title, suite=spec.suite, run=run.id, tasks=results, left_out=left_out)
    page = write_page(output, found)
    unlogged = {"samples", "values", "ids", "sheets"}
    run.log_dict(found.model_dump(mode="json", exclude={"tasks": {"__all__": unlogged}}), "results.json")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "report.html")
        local.write_text(page, encoding="utf-8")
        run.log_artifact(local)
    files = [FileEntry.from_bytes(name, storage.read_bytes(storage.join(output, name))) for name in (PAGE, RESULTS)]
    own = {f"{one.name}.{kind}" for one in results for kind in ("json", "jsonl", "verdicts.jsonl")}
    for entry in file_entries(storage.join(output, TASKS)):
        if entry.path in own:
            files.append(entry.model_copy(update={"path": f"{TASKS}/{entry.path}"}))
    return found, files, inputs


def _contamination(spec: SuiteSpecification, prepared: Sequence[Prepared], progress: Progress) -> dict[str, list[bool]]:
    if not spec.training:
        return {}
    from calumma.platform.evaluation.suite.contamination import contaminated

    texts = {one.task.name: one.texts for one in prepared if one.texts}
    return contaminated(texts, [spec.locate(location) for location in spec.training], progress)


# -- one task after the other


class _Runner:
    """Measures tasks. The system is opened by the first task that needs it, judges by the first that asks them."""

    def __init__(
        self,
        spec: SuiteSpecification,
        output: str,
        stack: ExitStack,
        progress: Progress,
        tasks: int,
        inputs: dict[str, str],
    ) -> None:
        self._spec, self._output, self._stack, self._progress = spec, output, stack, progress
        self._tasks, self._inputs = tasks, inputs
        self._opened: System | None = None
        self._judges: dict[str, Judge] = {}
        self._note = ""
        self._number = 0

    def result(self, number: int, one: Prepared, held: list[bool] | None) -> TaskResult:
        """The task's figures, of an earlier run where nothing of what they are made from has changed."""
        key = self._key(one)
        self._number, self._note = number, one.task.name
        count = None if held is None else sum(held)
        if (before := self._finished(one, key)) is not None:
            if before.contaminated != count:
                before = before.model_copy(update={"contaminated": count})
                before.write(self._output)
            return before
        self._tell(0, 1)
        begin = time.monotonic()
        answers: list[list[Answer]] = []
        if one.text is not None:
            found = one.text.measure(self._system, self._tell)
        elif one.pictures:
            model = self._spec.system.model
            assert model is not None
            location = model if model.startswith("models:") else self._spec.locate(model)
            found = drawing.reconstruct(location, self._spec.tracking, one.pictures, one.task.weights)
        else:
            answers = self._answers(one, key)
            found = self._graded(one, answers)
        result = _result(one, key, found, answers, time.monotonic() - begin, count)
        write_verdicts(self._output, one.task.name, _verdicts(one, found, result.ids))
        result.write(self._output)
        return result

    def _finished(self, one: Prepared, key: str) -> TaskResult | None:
        before = TaskResult.find(self._output, one.task.name)
        return before if before is not None and before.key == key else None

    def unable(self, prepared: Sequence[Prepared]) -> dict[str, str]:
        """Of what is still to be asked, what an endpoint cannot, and why. Raises as `preparing.unable` does."""
        if self._spec.system.url is None:
            return {}
        left = [one for one in prepared if self._finished(one, self._key(one)) is None]
        return unable(self._spec, self._system, left) if left else {}

    def _tell(self, done: int, total: int) -> None:
        share = (self._number + done / max(1, total)) / self._tasks
        self._progress(share, 1, f"{self._note}: {done:,} of {total:,}" if done else self._note)

    def _told(self, line: str) -> None:
        self._progress((self._number + 0.5) / self._tasks, 1, f"{self._note}: {line}")

    @property
    def _system(self) -> System:
        if self._opened is None:
            spec = self._spec.system
            if spec.model is not None and not spec.model.startswith("models:"):
                spec = spec.model_copy(update={"model": self._spec.locate(spec.model)})
            opened = open_system(spec, self._spec.resources, self._spec.tracking, self._told)
            self._opened = self._stack.enter_context(opened)
        return self._opened

    def _judge(self, name: str, spec: JudgeSpecification) -> Judge:
        if name not in self._judges:
            places = {field: self._spec.locate(place) for field in PLACES if (place := getattr(spec, field))}
            self._judges[name] = open_judge(spec.model_copy(update=places), self._spec.tracking, self._told)
            self._stack.callback(self._judges[name].close)
        return self._judges[name]

    def _key(self, one: Prepared) -> str:
        """Of all that the figures depend on."""
        items = [
            [i.id, shown(i.prompt, 1 << 20), _digests(i), str(i.sampling), str(i.expected), i.later] for i in one.items
        ]
        judges = judges_of(self._spec, one.task, one.benchmark.needs == "a judge of pictures")
        system = self._spec.system.model_dump(exclude={"name", "concurrency", "timeout", "patience", "batch"})
        values = [
            one.task.model_dump(mode="json"), system, self._inputs.get(self._model), items, one.texts, one.pictures,
            {name: judge.model_dump(mode="json") for name, judge in judges.items()}, self._spec.seed,
            [self._inputs.get(self._spec.locate(p)) for j in judges.values() for p in (j.training, j.held_out) if p],
            self._inputs.get(self._spec.locate(one.task.training_pictures)) if one.task.training_pictures else None,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _model(self) -> str:
        model = self._spec.system.model or ""
        return model if model.startswith("models:") or not model else self._spec.locate(model)

    def _answers(self, one: Prepared, key: str) -> list[list[Answer]]:
        answers = read_answers(self._output, one.task.name, key)[: len(one.items)]
        while len(answers) < len(one.items):
            part = one.items[len(answers) : len(answers) + PART]
            before = len(answers)
            found = self._system.answer(
                [Prompt(item.prompt, item.sampling) for item in part],
                lambda done, _, before=before: self._tell(before + done, len(one.items)),  # type: ignore[misc]
            )
            own = [[answer] for answer in found]
            for turn in range(max(len(item.later) for item in part)):
                going = [number for number, item in enumerate(part) if len(item.later) > turn]
                asked = [Prompt(dialogue(part[number], own[number]), part[number].sampling) for number in going]
                for number, answer in zip(going, self._system.answer(asked), strict=True):
                    own[number].append(answer)
            answers += own
            write_answers(self._output, one.task.name, key, answers)
        return answers

    def _graded(self, one: Prepared, answers: Answers) -> Measured:
        spec, benchmark = self._spec, one.benchmark
        if one.task.benchmark == "safety":
            exchanges = safety.exchanges(one.items, answers)
            judges = judges_of(spec, one.task, sees=False)
            verdicts = {name: list(self._judge(name, judge).safety(exchanges)) for name, judge in judges.items()}
            return safety.grade_safety(one.items, answers, verdicts)  # type: ignore[arg-type]
        if one.task.benchmark in conversations.KINDS:
            seeing = judges_of(spec, one.task, sees=True)
            if one.task.benchmark == "picture_to_word" or not seeing:
                return conversations.grade_conversations(one.task, one.items, answers, lambda pictures, labels: [], {})
            namer = self._judge(*next(iter(seeing.items())))
            training = spec.locate(one.task.training_pictures) if one.task.training_pictures else None
            return conversations.grade_conversations(
                one.task, one.items, answers, namer.names, namer.accuracy, training
            )
        if one.task.benchmark == "drawing":
            weights = {name: spec.locate(location) for name, location in one.task.weights.items()}
            return drawing.grade_drawing(one.items, answers, weights)
        if one.task.benchmark in ("following", "interleaved"):
            seeing = judges_of(spec, one.task, sees=True)
            ask = None
            if seeing:
                name, judge = next(iter(seeing.items()))
                ask = self._judge(name, judge).shows
            if one.task.benchmark == "interleaved":
                return drawing.grade_interleaved(one.items, answers, ask)
            assert ask is not None
            return drawing.grade_following(one.items, answers, ask)
        assert benchmark.grade is not None
        return benchmark.grade(one.items, answers)


def _digests(item: Item) -> list[str]:
    """Of the prompt's pictures."""
    return [hashlib.sha256(i.data if isinstance(i.data, bytes) else i.png()).hexdigest() for i in item.prompt.images]


def _result(
    one: Prepared, key: str, found: Measured, answers: Answers, seconds: float, contaminated: int | None
) -> TaskResult:
    every = [answer for each in answers for answer in each]
    tokens = {name: sum(getattr(a, f"{name}_tokens") for a in every) for name in ("prompt", "text", "image")}
    headline = presets.metric_of(one.task.name, one.benchmark.headline, found.metrics)
    failed = [answer.error for answer in every if answer.error is not None]
    notes = [*one.notes, *found.notes] + (
        [f"{len(failed)} prompts were not answered, the first: {failed[0]}"] if failed else []
    )
    intervals = {name: interval for name in found.values if (interval := found.interval(name)) is not None}
    return TaskResult(
        name=one.task.name,
        benchmark=one.task.benchmark,
        key=key,
        headline=headline,
        metrics=found.metrics,
        intervals={name: (value.low, value.high) for name, value in intervals.items()},
        ids=[item.id for item in one.items] or [str(number) for number in range(len(found.graded))],
        values=found.values,
        failures=len(failed),
        shots=one.task.shots,
        seconds=seconds,
        tokens=tokens if every else found.tokens,
        notes=notes,
        samples=_samples(one, found, answers),
        sheets={name: data_url(png) for name, png in found.sheets.items()},
        contaminated=contaminated,
    )


def _verdicts(one: Prepared, found: Measured, ids: Sequence[str]) -> list[Verdict]:
    questions = [shown(item.prompt, 2000) for item in one.items] or [""] * len(found.graded)
    return [
        Verdict(id=key, question=question, expected=graded.expected, said=graded.said, values=graded.values)
        for key, question, graded in zip(ids, questions, found.graded, strict=True)
    ]


def _samples(one: Prepared, found: Measured, answers: Answers) -> list[Sample]:
    samples = []
    for number, graded in enumerate(found.graded[:SHOWN]):
        question = shown(one.items[number].prompt, 600) if one.items else ""
        asked = [] if not one.items else [_thumbnail(image) for image in one.items[number].prompt.images[-1:]]
        drawn = [] if not answers else [_thumbnail(image) for image in answers[number][0].document.images[:4]]
        samples.append(
            Sample(
                question=question,
                asked=asked,
                said=graded.said[:600],
                drawn=drawn,
                expected=graded.expected[:300],
                values=graded.values,
            )
        )
    return samples


def _thumbnail(image: Image) -> str:
    import io

    picture = image.open()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_url(buffer.getvalue())
