"""Evaluation of a model on held-out conversations: a suite of one's own tasks, with a classifier of pictures as judge.

What it adds to the suite is the short form of its specification, and figures and contact sheets under the tasks' names.
"""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING

from PIL import Image as PILImage

from calumma.platform.cluster.progress import Progress
from calumma.platform.evaluation.benchmarks.conversations import KINDS, MODES, SPARE_TOKENS
from calumma.platform.evaluation.benchmarks.specification import SuiteTask
from calumma.platform.evaluation.judges.specification import JudgeSpecification
from calumma.platform.evaluation.specification import EvaluateSpecification
from calumma.platform.evaluation.suite.results import SuiteResults, read_verdicts
from calumma.platform.evaluation.suite.running import measure, metrics_of
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.evaluation.tasks import Case

if TYPE_CHECKING:
    from calumma.model.generation import SamplingParams
    from calumma.platform.storage.manifest import Manifest
    from calumma.platform.tracking.run import Run

BENCHMARK_OF = {kind: benchmark for benchmark, kind in KINDS.items()}
JUDGE = "pictures"
FILES = {"sheet": "{}.png", "confusion": "{}_confusion.png"}


def evaluate(spec: EvaluateSpecification, run: Run, progress: Progress) -> Manifest:
    """Run all tasks; metrics and contact sheets go to the run, the page, answers and sheets to `spec.output`.

    Raises JudgeDataError, BenchmarkDataError, StorageError, TrackingError, SpecificationError.
    """
    from calumma.platform import storage
    from calumma.platform.storage.manifest import FileEntry, Manifest

    suite = suite_specification(spec)
    found, entries, inputs = measure(suite, run, progress)
    output = spec.output_uri
    own = {task.name for task in spec.tasks}

    def publish(path: str, data: bytes, rows: int) -> None:
        storage.write_bytes(storage.join(output, path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=rows))

    for task in found.tasks:
        if task.name in own:
            rows = [
                {"question": v.question, "expected": v.expected, "said": v.said, "right": v.values[task.headline] == 1}
                for v in read_verdicts(output, task.name)
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            publish(f"{task.name}.jsonl", lines.encode(), len(rows))
            for name, url in task.sheets.items():
                path, data = FILES[name].format(task.name), base64.b64decode(url.partition(",")[2])
                run.log_image(PILImage.open(io.BytesIO(data)), f"evaluation/{path}")
                publish(path, data, 0)
    metrics = _metrics(found, own)
    run.log_metrics(metrics)
    report = {**metrics, "run": run.id, "cases": {task.name: len(task.ids) for task in found.tasks if task.name in own}}
    report["left_out"] = found.left_out
    manifest = Manifest(
        kind="evaluation", files=entries, specification=spec.model_dump(mode="json"), report=report, inputs=inputs
    )
    manifest.write(output)
    return manifest


def suite_specification(spec: EvaluateSpecification) -> SuiteSpecification:
    """The suite that an evaluation is."""
    names = [task.name for task in spec.tasks]
    only = [*names, *(name for name in spec.only if name not in names)] if spec.only else []
    return SuiteSpecification(
        **spec.model_dump(include={"storage", "tracking", "resources", "run_name", "seed", "output", "data"}),
        only=only,
        suite=spec.suite,
        system=SystemSpecification(model=spec.model, batch=spec.batch, pictures=spec.pictures),
        tasks=[
            SuiteTask(
                name=task.name,
                benchmark=BENCHMARK_OF[task.kind],
                data=spec.locate(task.documents),
                limit=task.limit,
                labels=spec.labels,
                parts=spec.judge.parts,
                training_pictures=spec.training_pictures,
            )
            for task in spec.tasks
        ],
        judges={
            JUDGE: JudgeSpecification(
                kind="pictures",
                training=spec.judge_training,
                held_out=spec.judge_held_out,
                features=spec.judge.features,
                parts=spec.judge.parts,
            )
        },
        skip_missing=True,
    )


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


def _metrics(found: SuiteResults, own: set[str]) -> dict[str, float]:
    """TASK_MEASURE of own tasks, TASK/MEASURE of the suite's, and the judge's accuracy once."""
    metrics: dict[str, float] = {}
    for task in found.tasks:
        if task.name in own:
            for name, value in task.metrics.items():  # of the judge once, whichever task it judged
                metrics[name if name.startswith("judge_") else f"{task.name}_{name}"] = value
    return {**metrics, **metrics_of([task for task in found.tasks if task.name not in own])}
