"""A ladder of sizes: the learning rate found at the first, a training of each, a law fitted to all but the last, and
whether it foretold the last.

What it found is published as ladder.json, ladder.png and report.html, and as metrics of the run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from calumma.model.config import ModelConfig
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import SpecificationError, with_absolute_storage
from calumma.platform.storage.manifest import MANIFEST, Manifest, file_entries
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training.forecast.shape import flops_per_token, parameters
from calumma.platform.training.trials import law, rung
from calumma.platform.training.trials.ladder_page import figure, page
from calumma.platform.training.trials.law import Training
from calumma.platform.training.trials.running import Case, Event, run_cases
from calumma.platform.training.trials.specification import LadderSpecification
from calumma.platform.training.trials.trial import read_vocabulary, require_shards

KIND = "ladder"
PICTURE, DATA, PAGE = "ladder.png", "ladder.json", "report.html"


class Swept(NamedTuple):
    """A short training of the sweep: the loss while it cooled down."""

    size: int
    learning_rate: float
    loss: float


def run(spec: LadderSpecification, run: Run, progress: Progress) -> Manifest:
    """Raises SpecificationError."""
    original, spec = spec, with_absolute_storage(spec)
    require_shards(spec, iter([*spec.mixture, *spec.held_out]))
    inputs = fingerprints(map(spec.locate, [*spec.mixture, *spec.held_out, spec.text_tokenizer]))
    vocabulary_size = read_vocabulary(spec).size
    shapes = [spec.shape(number, vocabulary_size) for number in range(len(spec.sizes))]
    whole = _cost(spec, shapes, sweep=True) + _cost(spec, shapes, sweep=False)
    before = 0.0

    def part(done: float, total: float, note: str = "") -> None:
        progress(before + done, whole, note)

    def heard(name: str, event: Event) -> None:
        run.log_metrics({f"loss/{name}": event["loss"]}, int(event["step"]))

    cases = sweep_cases(spec, shapes, inputs)
    events = run_cases(cases, spec.checkpoints, spec.resources, part, heard, spec.checkpoint_minutes)
    swept = [Swept(case.arguments[1], case.arguments[2], events[case.name][-1]["loss"]) for case in cases]
    rate = best_rate([one for one in swept if one.size == 0]) if swept else spec.optimizer.learning_rate
    before = _cost(spec, shapes, sweep=True)
    cases = size_cases(spec, shapes, rate, inputs)
    events = run_cases(cases, spec.checkpoints, spec.resources, part, heard, spec.checkpoint_minutes)
    trainings = _trainings(cases, events, shapes)
    found = findings(spec, shapes, rate, swept, trainings)
    output = spec.output_uri
    _publish(spec, found, output, run)
    manifest = Manifest(
        kind=KIND,
        files=[entry for entry in file_entries(output) if not entry.path.startswith("checkpoints/")],
        specification=original.model_dump(mode="json"),
        report={"run": run.id, **summary(found)},
        inputs=inputs,
    )
    manifest.write(output)
    return manifest


def _count(shape: ModelConfig) -> int:
    return sum(parameters(shape).values())


# -- what is trained ---------------------------------------------------------------------------------------------------


def sweep_cases(spec: LadderSpecification, shapes: Sequence[ModelConfig], inputs: dict[str, str]) -> list[Case]:
    """The short trainings that look for a learning rate, if there is a sweep."""
    if spec.sweep is None:
        return []
    ends = [spec.sweep.steps]
    pairs = [(number, rate) for number in range(spec.sweep.sizes) for rate in spec.sweep.learning_rates]
    return [
        _case(spec, shapes, inputs, f"sweep/{_name(shapes[number])}/{rate:g}", (number, rate, spec.seed, ends))
        for number, rate in pairs
    ]


def size_cases(
    spec: LadderSpecification, shapes: Sequence[ModelConfig], rate: float, inputs: dict[str, str]
) -> list[Case]:
    """A training of each size and seed."""
    return [
        _case(spec, shapes, inputs, f"size/{_name(shapes[number])}/{seed}", (number, rate, seed, spec.ends(number)))
        for number, size in enumerate(spec.sizes)
        for seed in range(spec.seed, spec.seed + size.seeds)
    ]


def _name(shape: ModelConfig) -> str:
    return f"{_count(shape) / 1e6:.1f}M"


def _case(
    spec: LadderSpecification,
    shapes: Sequence[ModelConfig],
    inputs: dict[str, str],
    name: str,
    arguments: tuple[int, float, int, list[int]],
) -> Case:
    number, rate, seed, ends = arguments
    fields = {"z_loss", "optimizer", "micro_batches", "precision", "cooldown", "warmup_steps", "log_every", "hold_back"}
    decides: dict[str, Any] = spec.model_dump(mode="json", include=fields | {"held_out_micro_batches"})
    decides |= {"inputs": sorted(inputs.values()), "mixture": [*spec.mixture.values()], "rate": rate, "seed": seed}
    decides |= {"shape": shapes[number].model_dump(mode="json"), "base": shapes[0].model_dump(mode="json")}
    return Case(
        name,
        rung.train_size,
        (spec, *arguments),
        decides | {"ends": ends},
        flops_per_token(shapes[number]) * rung.steps_taken(spec, ends),
    )


def _cost(spec: LadderSpecification, shapes: Sequence[ModelConfig], sweep: bool) -> float:
    cases = sweep_cases(spec, shapes, {}) if sweep else size_cases(spec, shapes, 1.0, {})
    return sum(case.cost for case in cases)


def best_rate(swept: Sequence[Swept]) -> float:
    """Where a parabola through the lowest loss and its neighbours, over the rate's logarithm, has its lowest point; the
    lowest itself where it is the first or last. Raises SpecificationError when none is finite."""
    finite = sorted((one for one in swept if math.isfinite(one.loss)), key=lambda one: one.learning_rate)
    if not finite:
        raise SpecificationError("sweep: no training came to a finite loss; give lower learning rates")
    at = min(range(len(finite)), key=lambda number: finite[number].loss)
    if not 0 < at < len(finite) - 1:
        return finite[at].learning_rate
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(one.learning_rate), one.loss) for one in finite[at - 1 : at + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return math.exp((x0 + x1) / 2 - left / (2 * curvature)) if curvature > 0 else finite[at].learning_rate


def _trainings(
    cases: Sequence[Case], events: Mapping[str, Sequence[Event]], shapes: Sequence[ModelConfig]
) -> list[Training]:
    """Every length of every case. Seeds of a size pack other documents into as many steps: all count with the mean of
    their tokens."""
    ended = [
        (size, seed, event)
        for case in cases
        for (_, size, _, seed, _) in (case.arguments,)
        for event in events[case.name]
        if "nll" in event
    ]
    lengths: dict[tuple[int, int], list[int]] = {}
    for size, _, event in ended:
        lengths.setdefault((size, int(event["step"])), []).append(event["tokens"])
    tokens = {key: round(sum(each) / len(each)) for key, each in lengths.items()}
    return [
        Training(size, seed, _count(shapes[size]), tokens[size, int(event["step"])], event["nll"], event["counts"])
        for size, seed, event in ended
    ]


# -- what it found -----------------------------------------------------------------------------------------------------


def findings(
    spec: LadderSpecification,
    shapes: Sequence[ModelConfig],
    rate: float,
    swept: Sequence[Swept],
    trainings: Sequence[Training],
) -> dict[str, Any]:
    """As plain values: sizes, the sweep, all trainings, the law of the smaller sizes and how it did on the largest, the
    law of all and what it says about the next size, intervals as [value, low, high]. Raises SpecificationError when a
    training has diverged."""
    last = len(shapes) - 1
    for one in trainings:
        if not math.isfinite(one.loss):
            told = f"the training of {_name(shapes[one.size])} with seed {one.seed} has diverged"
            raise SpecificationError(f"{told}, and no law is fitted to that; give lower rates in `sweep`, or a warm-up")
    smaller = [one for one in trainings if one.size < last]
    largest = [one for one in trainings if one.size == last]
    resamples = law.resample(trainings, spec.bootstrap, spec.seed)
    before, after = (law.fit_trainings(some, resamples) for some in (smaller, trainings))
    checks = []
    for tokens in sorted({one.tokens for one in largest}):
        of = [one for one in largest if one.tokens == tokens]
        found = law.check(before, of, resamples)
        checks.append({"tokens": tokens, **{name: _plain(value) for name, value in vars(found).items()}})
    upward = LadderSpecification.model_validate(
        spec.model_dump() | {"sizes": [*spec.sizes, _next_size(spec, shapes)]}
    ).shape(last + 1, shapes[0].vocabulary_size)
    longest = max(one.tokens for one in largest)
    return {
        "sizes": [_size(shape, shapes[0], rate) for shape in shapes],
        "learning_rate": rate,
        "sweep": [one._asdict() for one in swept],
        "trainings": [
            {
                **{"size": one.size, "seed": one.seed, "parameters": one.parameters, "tokens": one.tokens},
                **{"compute": one.tokens * flops_per_token(shapes[one.size]), "loss": one.loss},
            }
            for one in trainings
        ],
        "documents": len(trainings[0].nll),
        "law": _law(before),
        "checks": checks,
        "law_of_all": _law(after),
        "next": {
            **_size(upward, shapes[0], rate),
            "tokens": longest,
            "compute": longest * flops_per_token(upward),
            "predicted": _plain(after.loss(_count(upward), longest)),
        },
    }


def _next_size(spec: LadderSpecification, shapes: Sequence[ModelConfig]) -> dict[str, Any]:
    """As much larger than the last as that is than the one before."""
    before, last = map(_count, shapes[-2:])
    return spec.sizes[-1].model_dump() | {"parameters": last * last / before}


def _size(shape: ModelConfig, base: ModelConfig, rate: float) -> dict[str, Any]:
    return {
        "parameters": _count(shape),
        **shape.model_dump(include={"layers", "width", "heads", "ffn_width"}),
        "flops_per_token": flops_per_token(shape),
        "hidden_learning_rate": rate * base.width / shape.width,
    }


def _law(fitted: law.Fitted) -> dict[str, list[float]]:
    return {name: _plain(fitted.number(name)) for name in ("E", "A", "alpha", "B", "beta")}


def _plain(interval: law.Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of the manifest and of MLflow."""
    at_end = found["checks"][-1]
    return {
        "learning_rate": found["learning_rate"],
        "predicted": at_end["predicted"][0],
        "measured": at_end["measured"][0],
        "error": at_end["error"][0],
        "next_predicted": found["next"]["predicted"][0],
        **{f"law_{name}": value for name, (value, _, _) in found["law_of_all"].items()},
    }


def _publish(spec: LadderSpecification, found: dict[str, Any], output: str, run: Run) -> None:
    storage.delete(storage.join(output, MANIFEST))
    picture = io.BytesIO()
    figure(found).savefig(picture, format="png", dpi=110)
    storage.write_bytes(storage.join(output, PICTURE), picture.getvalue())
    storage.write_bytes(storage.join(output, DATA), json.dumps(found, indent=1).encode())
    storage.write_bytes(storage.join(output, PAGE), page(spec.run_name or "ladder", found, picture.getvalue()).encode())
    run.log_metrics(summary(found))
    with storage.local_copy(output) as path:
        for name in (PICTURE, DATA, PAGE):
            run.log_artifact(Path(path, name))
