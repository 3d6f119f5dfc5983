"""What the quickstart leaves behind: results.json, report.html (see page.py), and what it prints at its end."""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calumma.jobs.quickstart import steps
from calumma.jobs.quickstart.course import CLUSTER, FROM_IMAGE_TOKENIZER, Course
from calumma.jobs.quickstart.page import STAGES, Curve, Story, page
from calumma.jobs.quickstart.steps import DIGITS, QuickstartResult
from calumma.platform import storage
from calumma.platform.cluster.progress import format_duration

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

RESULTS = "results.json"
PAGE = "report.html"


def results(outcome: QuickstartResult) -> dict[str, Any]:
    """What results.json holds. `seconds`: by step, of the call that ran it."""
    course = outcome.options.course
    evaluated = outcome.manifests["evaluate"].report
    tokenizer = outcome.manifests["train_image_tokenizer"].report
    values = {key: (tokenizer if key in FROM_IMAGE_TOKENIZER else evaluated)[key] for key in course.measured}
    order = [step.name for step in (course.steps[0], CLUSTER, *course.steps[1:])]
    return {
        **values,
        "seconds": {name: outcome.seconds[name] for name in order if name in outcome.seconds},
        "model_uri": outcome.model_uri,
        "evaluation_directory": outcome.specifications["evaluate"].output_uri,
        "model_directory": f"{outcome.specifications['finetune'].output_uri}/model",
    }


def write(outcome: QuickstartResult) -> dict[str, Any]:
    """Write results.json and report.html into the working folder; the results. Raises StorageError."""
    found = results(outcome)
    folder = outcome.options.workdir
    storage.write_bytes(str(folder / RESULTS), f"{json.dumps(found, indent=1)}\n".encode())
    story = Story(
        course=outcome.options.course,
        results=found,
        fast=outcome.options.fast,
        answers=steps.read_answers(outcome),
        curves={name: history(outcome, name) for name in (*STAGES, "train_image_tokenizer")},
        sheets=sheets(outcome),
        commands=commands(outcome),
    )
    storage.write_bytes(str(folder / PAGE), page(story).encode())
    return found


def history(outcome: QuickstartResult, step: str) -> dict[str, Curve]:
    """Every metric of a step's MLflow run. Of a step that was interrupted and resumed, the earlier runs' part as well.

    A registry that does not know the run (storage shared with another machine) gives nothing.
    """
    from mlflow.exceptions import MlflowException

    from calumma.platform.tracking.run import Run

    run = Run(outcome.tracking_uri, str(outcome.manifests[step].report.get("run")))
    try:
        return _merged(run, step)
    except MlflowException as error:
        logger.warning("no curves of %s: %s", step, error)
        return {}


def _merged(run: Any, step: str) -> dict[str, Curve]:
    own = run.client.get_run(run.id)
    runs = run.client.search_runs(
        [own.info.experiment_id],
        filter_string=f"attributes.run_name = '{step}' and attributes.start_time <= {own.info.start_time}",
        order_by=["attributes.start_time DESC"],
    )
    points: dict[str, dict[int, float]] = {}
    for place, one in enumerate(runs):
        if place and one.info.status == "FINISHED":  # an earlier quickstart, with its own beginning
            break
        for metric in one.data.metrics:
            found = points.setdefault(metric, {})
            first = min(found, default=None)
            for entry in run.client.get_metric_history(one.info.run_id, metric):
                if first is None or entry.step < first:
                    found[entry.step] = entry.value
    return {name: Curve(sorted(found), [found[s] for s in sorted(found)]) for name, found in points.items()}


def sheets(outcome: QuickstartResult) -> dict[str, bytes]:
    """Title -> PNG: the evaluation's contact sheets, and the image tokenizer's reconstructions."""
    place = outcome.specifications["evaluate"].output_uri
    course = outcome.options.course
    found = {title: storage.read_bytes(storage.join(place, f"{name}.png")) for name, title in course.sheets.items()}
    reconstructions = _artifact(outcome, "train_image_tokenizer", "samples/reconstructions.png")
    if reconstructions is not None:
        found[course.reconstructions] = reconstructions
    return found


def _artifact(outcome: QuickstartResult, step: str, path: str) -> bytes | None:
    from mlflow.exceptions import MlflowException

    from calumma.platform.tracking.run import Run

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would end in the terminal
    run = Run(outcome.tracking_uri, str(outcome.manifests[step].report.get("run")))
    with tempfile.TemporaryDirectory(prefix="calumma-report-") as folder:
        try:
            return Path(run.client.download_artifacts(run.id, path, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            logger.warning("no %s of %s: %s", path, step, error)
            return None


def commands(outcome: QuickstartResult) -> list[tuple[str, str]]:
    """(what it does, command) to go on with."""
    database = outcome.tracking_uri
    serve = ["calumma", "serve", "start", outcome.model_uri, "--tracking-uri", database]
    return [
        ("Serve the model again", shlex.join(serve)),
        ("Talk with it", "calumma chat"),
        ("Look at runs, curves and pictures", shlex.join(["mlflow", "ui", "--backend-store-uri", database])),
    ]


def table(found: dict[str, Any], course: Course = DIGITS) -> Table:
    """The closing table: what, measured, target, where to look."""
    from rich.table import Table

    where = {name: PAGE if name in course.targets else "MLflow: evaluate" for name in course.measured}
    where |= dict.fromkeys(FROM_IMAGE_TOKENIZER, "MLflow: train_image_tokenizer")
    made = Table(title="calumma quickstart", title_justify="left")
    made.add_column("What")
    made.add_column("Measured", justify="right", no_wrap=True)
    made.add_column("Target", justify="right", no_wrap=True)
    made.add_column("Where to look")
    for name, title in course.measured.items():
        colour = "" if name not in course.targets else "[yellow]" if course.missed(name, found[name]) else "[green]"
        made.add_row(title, f"{colour}{course.shown(name, found[name])}", course.goal(name), where[name])
    made.add_section()
    titles = course.titles
    for name, seconds in found["seconds"].items():
        made.add_row(f"[dim]{titles[name]}", f"[dim]{format_duration(seconds)}", "", "")
    made.add_row("All steps", format_duration(sum(found["seconds"].values())), "", RESULTS)
    return made


def places(found: dict[str, Any], workdir: Path) -> list[tuple[str, str]]:
    """(what, where it is): paths and URIs to be copied. They stand below the table, whose cells would break them."""
    return [
        ("Report, with pictures", str(workdir / PAGE)),
        ("Evaluation, with the miniature benchmarks", f"{found['evaluation_directory']}/report.html"),
        ("Results", str(workdir / RESULTS)),
        ("Model", found["model_uri"]),
        ("Its files", found["model_directory"]),
    ]
