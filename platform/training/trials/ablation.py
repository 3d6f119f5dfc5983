"""Stability at small scale: the norms that query-key norm, z-loss, dropout and norm order bound, with and without them.

A large model diverges late and after its norms have grown for long (paper section 2.3); at a high learning rate a small
one shows the growth within minutes ("Small-scale proxies for large-scale Transformer training instabilities", arXiv
2309.14322). All curves are metrics of one MLflow run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import with_absolute_storage
from calumma.platform.storage.manifest import MANIFEST, Manifest, file_entries
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training.steps import engine
from calumma.platform.training.steps.schedule import learning_rate
from calumma.platform.training.trials.ablation_figure import PANELS, figure
from calumma.platform.training.trials.instruments import divergence, first_to_rise, worth
from calumma.platform.training.trials.running import SHARE, Case, Event, Notebook, run_cases
from calumma.platform.training.trials.specification import AblateSpecification
from calumma.platform.training.trials.trial import Corpus, Trial, fresh, require_shards

KIND = "ablation"
Curves = dict[tuple[str, float], list[list[Event]]]  # (variant, learning rate) -> the points of each seed


def run(spec: AblateSpecification, run: Run, progress: Progress) -> Manifest:
    """Train all variants at all learning rates and publish curves and figure. Raises SpecificationError."""
    original, spec = spec, with_absolute_storage(spec)
    require_shards(spec, iter(spec.mixture))
    inputs = fingerprints([*map(spec.locate, spec.mixture), spec.locate(spec.text_tokenizer)])
    asked = {(name, rate): cases_of(spec, name, rate, inputs) for rate in spec.learning_rates for name in spec.variants}

    def heard(name: str, event: Event) -> None:
        known = {key: value for key, value in event.items() if key not in ("step", SHARE) and math.isfinite(value)}
        run.log_metrics({f"{key}/{name}": value for key, value in known.items()}, int(event["step"]))

    every = [case for cases in asked.values() for case in cases]
    events = run_cases(every, spec.checkpoints, spec.resources, progress, heard)
    curves: Curves = {key: [events[case.name] for case in cases] for key, cases in asked.items()}
    output = spec.output_uri
    _publish(spec, curves, output, run)
    manifest = Manifest(
        kind=KIND,
        files=[entry for entry in file_entries(output) if not entry.path.startswith("checkpoints/")],
        specification=original.model_dump(mode="json"),
        report={"run": run.id, **summary(spec, curves)},
        inputs=inputs,
    )
    manifest.write(output)
    return manifest


def cases_of(spec: AblateSpecification, name: str, rate: float, inputs: dict[str, str]) -> list[Case]:
    """A case a seed."""
    decides = spec.model_dump(
        mode="json", include={"z_loss", "optimizer", "schedule", "steps", "micro_batches", "precision", "log_every"}
    )
    decides |= {"inputs": sorted(inputs.values()), "mixture": [*spec.mixture.values()], "rate": rate}
    decides |= {"shape": spec.variant(name)[0].model_dump(mode="json"), "variant": spec.variants[name]}
    return [
        Case(f"{name}/{rate:g}/{seed}", train_variant, (spec, name, rate, seed), decides | {"seed": seed})
        for seed in range(spec.seed, spec.seed + spec.seeds)
    ]


def train_variant(
    spec: AblateSpecification, name: str, rate: float, seed: int, notebook: Notebook | None = None
) -> Iterator[Event]:
    """One training: a point every `log_every` steps, until the end or the first loss that is not finite.

    Its loss is the mean since the last point, its gradient norm the largest; all else is measured, without dropout, on
    the same micro-batch of each source again and again. Raises ShardError and StorageError.
    """
    config, z_loss = spec.variant(name)
    corpus = Corpus.open(spec, seed)
    transformer = fresh(config, len(corpus.image_mask_V), seed, corpus.device)
    groups = engine.parameter_groups(transformer, spec.optimizer.weight_decay)
    trial, probes = Trial(corpus, transformer, groups, spec, z_loss, seed), corpus.first_batches()
    known = (notebook.read() if notebook else None) or {"points": [], "sums": [0.0, 0, 0.0]}
    points, (nll, tokens, norm) = list(known["points"]), known["sums"]
    if "trial" in known:
        trial.load(known["trial"])
    yield from points
    while trial.taken < spec.steps:
        found = trial.step(learning_rate(trial.taken, rate, spec.schedule, spec.steps))
        nll, tokens, norm = nll + found.nll, tokens + found.tokens, max(norm, found.gradient_norm)
        diverged = not math.isfinite(nll)
        if trial.taken % spec.log_every == 0 or trial.taken == 1 or diverged:
            point = {"step": trial.taken, "loss": nll / max(tokens, 1), "gradient_norm": norm}
            points.append(point | trial.instruments(probes) | {SHARE: trial.taken / spec.steps})
            yield points[-1]
            nll, tokens, norm = 0.0, 0, 0.0
        if diverged:
            return
        if notebook:
            sums = [nll, tokens, norm]
            notebook.turn(lambda: {"points": points, "sums": sums, "trial": trial.state()})  # noqa: B023


def _publish(spec: AblateSpecification, curves: Curves, output: str, run: Run) -> None:
    storage.delete(storage.join(output, MANIFEST))
    picture = io.BytesIO()
    figure(spec, curves).savefig(picture, format="png", dpi=110)
    storage.write_bytes(storage.join(output, "ablation.png"), picture.getvalue())
    records = [
        {"variant": name, "learning_rate": rate, "seed": spec.seed + number, "curve": points}
        for (name, rate), seeds in curves.items()
        for number, points in enumerate(seeds)
    ]
    storage.write_bytes(storage.join(output, "curves.json"), json.dumps(records).encode())
    storage.write_bytes(storage.join(output, "instruments.json"), json.dumps(findings(spec, curves)).encode())
    with storage.local_copy(output) as path:
        for name in ("ablation.png", "instruments.json"):
            run.log_artifact(Path(path, name))


def findings(spec: AblateSpecification, curves: Curves) -> dict[str, Any]:
    """What the instruments showed before the loss did: of each training, and of each instrument over all of them."""
    rule = (spec.spike, spec.alarm, spec.alarm_after)
    trainings = []
    for (name, rate), seeds in curves.items():
        for number, points in enumerate(seeds):
            first = first_to_rise(points, *rule)
            told = {"variant": name, "learning_rate": rate, "seed": spec.seed + number}
            told |= {"diverged": divergence(points, spec.spike), "loss": points[-1]["loss"]}
            trainings.append(told | {"first": first and first[0], "steps_before": first and first[1]})
    of = worth([points for seeds in curves.values() for points in seeds], *rule)
    instruments = {name: {**vars(found), "lead": found.lead} for name, found in of.items()}
    return {"trainings": trainings, "instruments": instruments}


def summary(spec: AblateSpecification, curves: Curves) -> dict[str, float]:
    """By variant and learning rate how many seeds diverged, and the mean over seeds of the last value of what is
    drawn."""
    found: dict[str, float] = {}
    for (name, rate), seeds in curves.items():
        found[f"{name}, {rate:g}: diverged"] = sum(divergence(points, spec.spike) is not None for points in seeds)
        for key, _, _ in PANELS:
            last = [points[-1].get(key, math.nan) for points in seeds if points]
            if last and all(map(math.isfinite, last)):
                found[f"{name}, {rate:g}: {key}"] = sum(last) / len(last)
    return found
