"""OUT/report.html: what a fine-tuning was given, what it chose, how it went, and answers before and after."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.curation.report.findings import excerpt
from calumma.platform.reports.charts import LineChart, Series, line_chart
from calumma.platform.reports.templates import render
from calumma.platform.tracking.run import Run
from calumma.platform.tracking.server import resolve_uri
from calumma.platform.training.sections import Lora

if TYPE_CHECKING:
    from calumma.jobs.tuning.steps import Outcome

TEMPLATE = "jobs/tuning/report.html.j2"
FILE = "report.html"
CURVES = {
    "loss": ("training", "var(--kept)"),
    "held_out/examples/loss": ("held out", "var(--image)"),
}


def write(outcome: Outcome) -> str:
    """The page's place."""
    place = storage.join(outcome.options.root, FILE)
    storage.write_bytes(place, page(outcome).encode())
    return place


def page(outcome: Outcome) -> str:
    spec, parts = outcome.specification, outcome.parts
    passes = sum(outcome.manifest.report["epochs"].values())
    answers = [
        {
            "question": excerpt(Document.from_row(sample.prompt)),
            "expected": excerpt(Document.from_row(sample.expected)),
            "before": excerpt(Document.from_row(sample.before)),
            "after": excerpt(Document.from_row(sample.after)) if sample.after else [],
        }
        for sample in outcome.samples
    ]
    chosen = {
        "learning rate": f"{spec.optimizer.learning_rate:g}",
        "steps": f"{spec.steps:,}",
        "passes over the examples": f"{passes:.1f}",
        "examples a step": f"{parts.train * passes / spec.steps:.1f}",
        "adapters": _adapters(spec.lora),
        "precision": spec.precision,
    }
    return render(
        TEMPLATE,
        outcome=outcome,
        losses=[(name, outcome.before.get(name), value) for name, value in outcome.after.items()],
        chosen=chosen,
        answers=answers,
        chart=_chart(outcome),
        serve=shlex.join(outcome.serve_command),
        jobs=["tokenize_preferences", "finetune"] if spec.preference else ["curate", "tokenize", "finetune"],
    )


def _adapters(lora: Lora | None) -> str:
    if lora is None:
        return "none, all weights"
    base = f", on weights of {lora.quantize} bits" if lora.quantize else ""
    return f"rank {lora.rank}, alpha {lora.alpha:g}{base}"


def _chart(outcome: Outcome) -> LineChart | None:
    run = Run(resolve_uri(outcome.specification.tracking), str(outcome.manifest.report["run"]))
    series = []
    for metric, (name, colour) in CURVES.items():
        points = sorted((m.step, m.value) for m in run.client.get_metric_history(run.id, metric))
        if points:
            series.append(Series(name, colour, [[(float(step), value) for step, value in points]]))
    return line_chart(series)
