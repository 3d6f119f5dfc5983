"""Curation: raw files -> checked, ordered documents in Parquet shards, one published directory a source.

A task is a file (or some, where there are very many), so a source's shards are the same whatever cluster makes them. A
document is either kept, dropped for a named reason, or bad (unreadable); more bad input than allowed fails the source,
which then publishes nothing.

Where every step looks at one document alone, a task reads, checks and writes in one go. Scores and duplicates take
phases (see calumma.platform.curation.tasks). Of duplicates the earlier stays, by the order of sources, files and
places; they are looked for last, so that no document goes for one which itself is not wanted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from PIL import ImageOps

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.cluster import capacity
from calumma.platform.cluster.progress import Progress
from calumma.platform.cluster.tasks import in_order
from calumma.platform.curation import tasks
from calumma.platform.curation.report import publish
from calumma.platform.curation.report.findings import Findings
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import chain, decontaminate, duplicates, scoring, staging
from calumma.platform.curation.tally import Tally
from calumma.platform.reports.contact_sheet import Cell, contact_sheet
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources import reading
from calumma.platform.sources.specification import Source
from calumma.platform.specification import Resources
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking.fingerprints import fingerprints, standing

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run

logger = logging.getLogger(__name__)

MAX_TASKS = 1024  # a source; with more files than that, neighbours share a task
SHOWN = 5  # bad inputs of a source that a message names; the manifest names more
SAMPLES, SIDE = 32, 72  # pictures on a contact sheet, and their width in pixels


class TooMuchBadInput(ValueError):
    """More of a source is unreadable than its specification allows, or nothing of it is left."""


Staged = tuple[str, int, int]  # path, first identity, documents


@dataclass
class _Work:
    """One source: what is to do, and what has come back."""

    source: Source
    number: int  # in the specification
    output: str
    alone: CurateSpecification  # that makes this source only: what its manifest records
    mark: str  # fingerprint of that specification and the input files
    inputs: dict[str, str]
    sizes: dict[str, int]
    ignored: list[str]
    tasks: list[dict[str, Any]]
    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)
    entries: list[FileEntry] = field(default_factory=list)
    staged: list[list[Staged]] = field(default_factory=list)  # of every task

    def take(self, result: dict[str, Any]) -> None:
        """Count in what a task returned."""
        self.tally.add(Tally.model_validate(result["tally"]))
        self.findings.add(Findings.model_validate(result["findings"]))
        self.entries += [FileEntry.model_validate(entry) for entry in result.get("files", ())]

    @property
    def parts(self) -> list[Staged]:
        return [part for task in self.staged for part in task]

    @property
    def documents_staged(self) -> int:
        return sum(count for _, _, count in self.parts)


_Pairs = list[tuple[_Work, dict[str, Any]]]


def run(spec: CurateSpecification, run: Run, progress: Progress) -> Manifest:
    """Curate all sources that no equal specification has published. Raises SpecificationError, TooMuchBadInput (after
    the good sources are published), ScorerFailed and StorageError."""
    chain.check(spec)
    for name in spec.scorers:
        _require(spec, _resources(spec, name))
    works = _plan(spec)
    published = _standing(spec, works)
    waiting = [w for w in works if w.source.name not in published]
    output = spec.locate(spec.output)
    mark = publishing.fingerprint(spec, {w.source.name: w.mark for w in works})
    with staging.folder(output, mark) if waiting and _is_staged(spec) else nullcontext("") as root:
        index = _index(spec, root) if waiting else None
        job = _Job(spec, run, progress, root, index)
        if spec.duplicates is not None or spec.scorers:
            published |= job.in_phases(waiting)
        else:
            published |= job.one_phase(waiting)
    manifest = publishing.together(document_shards.CURATED, spec, {s.name: published[s.name] for s in spec.sources})
    manifest.write(output)
    publish.write(output, manifest, {w.source.name: w.findings for w in waiting}, run)
    run.log_metrics(_metrics(manifest) | _seconds(waiting))
    return manifest


def _is_staged(spec: CurateSpecification) -> bool:
    return any((spec.duplicates, spec.scorers, spec.decontaminate))


def _resources(spec: CurateSpecification, scorer: str) -> Resources:
    return spec.resources if spec.resources.max_workers == 0 else spec.scorers[scorer].resources


def _require(spec: CurateSpecification, resources: Resources) -> None:
    if resources.max_workers:
        capacity.require(resources)


# -- what is to do -----------------------------------------------------------------------------------------------------


def _plan(spec: CurateSpecification) -> list[_Work]:
    """The tasks of all sources. Raises SpecificationError when a location has no files of its format."""
    listed = {source.name: reading.require_files(source, spec.locate) for source in spec.sources}
    steps = (spec.licenses, spec.domains)
    lists = [spec.locate(step.deny_file) for step in steps if step is not None and step.deny_file]
    against = [spec.locate(location) for location in spec.decontaminate.against] if spec.decontaminate else []
    given = fingerprints([spec.locate(source.location) for source in spec.sources] + lists + against)
    works = []
    for number, source in enumerate(spec.sources):
        alone = _alone(spec, source)
        sizes, ignored = listed[source.name]
        inputs = {uri: given[uri] for uri in [*(spec.locate(s.location) for s in alone.sources), *lists, *against]}
        everything = {uri: size for s in alone.sources for uri, size in listed[s.name][0].items()}
        mark = publishing.fingerprint(alone, everything | {uri: given[uri] for uri in lists + against})
        output = storage.join(spec.locate(spec.output), source.name)
        files, size = list(sizes), -(-len(sizes) // MAX_TASKS)
        made = [
            {
                "specification": spec.model_dump(mode="json"),
                "source": source.name,
                "place": [number, place],
                "files": files[begin : begin + size],
                "output": output,
                "stem": publishing.stem("documents", mark, place),
            }
            for place, begin in enumerate(range(0, len(files), size))
        ]
        works.append(_Work(source, number, output, alone, mark, inputs, sizes, ignored, made))
    return works


def _alone(spec: CurateSpecification, source: Source) -> CurateSpecification:
    """The specification on which this source's documents depend: of it and, where duplicates of earlier sources go, of
    those."""
    names = [s.name for s in spec.sources]
    if spec.duplicates is None or not chain.applies(spec.duplicates, source.name):
        return spec.only([source.name])
    earlier = [name for name in names[: names.index(source.name)] if chain.applies(spec.duplicates, name)]
    return spec.only([*earlier, source.name])


def _standing(spec: CurateSpecification, works: list[_Work]) -> dict[str, Manifest]:
    """Manifests of the sources that need not be made again."""
    published: dict[str, Manifest] = {}
    for w in works:
        manifest = standing(w.output, w.alone)
        if manifest is not None and manifest.report["fingerprint"] == w.mark:
            published[w.source.name] = manifest
    # Sources whose documents are compared are made together.
    compared = [w.source.name for w in works if chain.applies(spec.duplicates, w.source.name)]
    if not all(name in published for name in compared):
        published = {name: manifest for name, manifest in published.items() if name not in compared}
    return published


def _index(spec: CurateSpecification, root: str) -> str | None:
    """Where the index of evaluation sets is, made now. Raises SpecificationError and StorageError."""
    if spec.decontaminate is None:
        return None
    task = {
        "rules": spec.decontaminate.model_dump(mode="json"),
        "against": [spec.locate(location) for location in spec.decontaminate.against],
        "output": root,
        "index": storage.join(root, "evaluation.npz"),
    }
    for _ in in_order([task], decontaminate.build, spec.resources):
        pass
    return str(task["index"])


# -- doing it ----------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    spec: CurateSpecification
    run: Run
    progress: Progress
    root: str  # where work is staged
    index: str | None
    phase: int = 0
    phases: int = 1

    def one_phase(self, works: list[_Work]) -> dict[str, Manifest]:
        """Raises TooMuchBadInput when all good sources are published."""
        pairs = [(w, {**task, "index": self.index}) for w in works for task in w.tasks]
        return self._publishing(works, pairs, tasks.curate_files)

    def in_phases(self, works: list[_Work]) -> dict[str, Manifest]:
        """Raises TooMuchBadInput after the first phase when any source is too bad, since others depend on it."""
        spec, root = self.spec, self.root
        compared = [w for w in works if chain.applies(spec.duplicates, w.source.name)]
        self.phases = 2 + len(spec.scorers) + bool(compared) + bool(compared and spec.scorers)
        rows: Counter[str] = Counter()
        staging_tasks = [(w, {**task, "index": self.index, "root": root}) for w in works for task in w.tasks]
        for w, _, result in self._results(staging_tasks, tasks.stage_files, len(works)):
            w.take(result)
            w.staged.append([(path, first, count) for path, first, count in result["staged"]])
            rows.update(result["rows"])
        if failures := [problem for w in works if (problem := _problem(spec, w, w.documents_staged))]:
            raise TooMuchBadInput("\n".join(failures))
        for name, scorer in spec.scorers.items():
            of = [(w, task) for w in works if chain.applies(scorer, w.source.name) for task in self._scoring(w, name)]
            arguments = {"specification": spec.model_dump(mode="json"), "name": name}
            results = self._run([task for _, task in of], scoring.Scoring, _resources(spec, name), name, arguments)
            for (w, _), result in zip(of, results, strict=True):
                w.findings.add(Findings(seconds={"scorers": result["seconds"]}))
        if compared and spec.scorers:
            for w, _, result in self._results(self._on_staged(compared), tasks.sign_files, len(compared)):
                rows.update(result["rows"])
                w.findings.add(Findings(seconds={"duplicates": result["seconds"]}))
        if compared and spec.duplicates is not None:
            made = duplicates.tasks(root, spec.locate(spec.output), spec.duplicates, rows)
            self._run(made, duplicates.find, spec.resources, "duplicates")
        published = self._publishing(works, self._on_staged(works), tasks.finish_files)
        tasks.show_others([w.findings for w in works], [part for w in works for part in w.parts], root)
        return published

    def _publishing(self, works: list[_Work], pairs: _Pairs, work: Any) -> dict[str, Manifest]:
        """Do the tasks that write shards. Raises TooMuchBadInput when all good sources are published."""
        published: dict[str, Manifest] = {}
        failures: list[str] = []
        for w, task, result in self._results(pairs, work, len(works)):
            w.take(result)
            if task["place"] != w.tasks[-1]["place"]:
                continue
            if problem := _problem(self.spec, w, w.tally.kept):
                failures.append(problem)
                publishing.discard(storage.join(w.output, entry.path) for entry in w.entries)
                continue
            published[w.source.name] = manifest = _publish(w, self.run)
            if skipped := unreadable(w.source.name, manifest.report):
                logger.warning("%s", skipped)
        if failures:
            raise TooMuchBadInput("\n".join(failures))
        return published

    def _on_staged(self, works: list[_Work]) -> _Pairs:
        return [
            (w, {**task, "staged": staged, "root": self.root})
            for w in works
            for task, staged in zip(w.tasks, w.staged, strict=True)
        ]

    def _scoring(self, w: _Work, name: str) -> Iterator[dict[str, Any]]:
        for path, _, _ in w.parts:
            scores = scoring.place(self.root, name, path)
            yield {"file": tasks.document_file(self.root, path), "scores": scores, "output": w.output}

    def _results(self, pairs: _Pairs, work: Any, count: int) -> Iterator[tuple[_Work, dict[str, Any], dict[str, Any]]]:
        """Results of tasks over files, in order."""
        total = sum(len(task["files"]) for _, task in pairs)
        done = 0
        self._say(0, total, f"{total:,} files of {count} sources")
        results = in_order([task for _, task in pairs], work, self.spec.resources)
        for (w, task), result in zip(pairs, results, strict=True):
            yield w, task, result
            done += len(task["files"])
            self._say(done, total, f"{w.source.name}: {w.tally.kept:,} documents")
        self.phase += 1

    def _run(
        self, made: list[Any], work: Any, resources: Resources, note: str, arguments: dict[str, Any] | None = None
    ) -> list[Any]:
        results = []
        for result in in_order(made, work, resources, arguments):
            results.append(result)
            self._say(len(results), len(made), note)
        self.phase += 1
        return results

    def _say(self, done: int, total: int, note: str) -> None:
        self.progress(self.phase * total + done, self.phases * total, note)


def _problem(spec: CurateSpecification, w: _Work, kept: int) -> str | None:
    tally, name = w.tally.model_copy(update={"kept": kept}), w.source.name
    share = tally.bad_share(sum(w.sizes.values()))
    if tally.bad and share > spec.max_bad_share:
        examples = "".join(f"\n  {bad.name}: {bad.reason}" for bad in tally.examples[:SHOWN])
        return (
            f"source {name!r}: {share:.2%} of the input is unreadable ({tally.bad:,} bad, {tally.read:,} read), more "
            f"than max_bad_share allows ({spec.max_bad_share:.2%}); nothing of it was published. For example:{examples}"
            "\nRepair or remove these, or raise max_bad_share."
        )
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(tally.dropped.items()))
        return f"source {name!r}: no document is left of {tally.read:,} read" + (f" ({reasons})" if reasons else "")
    return None


def unreadable(source: str, report: dict[str, Any]) -> str | None:
    """What of a source was bad and skipped, in words, by the source's part of the manifest's report."""
    bad, examples = report.get("bad", 0), report.get("bad_inputs", [])[:SHOWN]
    if not bad:
        return None
    lines = [f"{example['name']}: {example['reason']}" for example in examples]
    if bad > len(lines):
        lines.append(f"and {bad - len(lines):,} more (see bad_inputs in the source's manifest)")
    return "\n  ".join([f"source {source!r}: {bad:,} unreadable, skipped:", *lines])


def _publish(w: _Work, run: Run) -> Manifest:
    manifest = Manifest(
        kind=document_shards.CURATED,
        files=w.entries,
        specification=w.alone.model_dump(mode="json"),
        report={
            "fingerprint": w.mark,
            "files": len(w.sizes),
            "files_ignored": len(w.ignored),
            "bytes": sum(w.sizes.values()),
            "bad_share": w.tally.bad_share(sum(w.sizes.values())),
            **w.tally.report(),
            "steps": {step: sum(reasons.values()) for step, reasons in w.findings.steps.items()},
        },
        inputs=w.inputs,
    )
    publishing.publish(w.output, manifest)
    if w.tally.images:
        run.log_image(samples(document_shards.read_documents(w.output)), f"samples/{w.source.name}.png")
    return manifest


def samples(documents: Iterable[Document]) -> PILImage.Image:
    """A contact sheet of the first images, each over its caption or the words of its document."""
    labelled = ((i, i.caption or d.text) for d in documents for i in d.images)
    cells = [
        # Square, because a sheet's cells are: nothing is stretched.
        Cell(ImageOps.pad(image.open(), (SIDE, SIDE), PILImage.Resampling.NEAREST), " ".join(words.split()))
        for image, words in islice(labelled, SAMPLES)
    ]
    return contact_sheet(cells, columns=8, side=SIDE)


def _seconds(works: list[_Work]) -> dict[str, float]:
    """That each step took of each source. No part of the manifest: equal curations have equal ones."""
    return {f"{w.source.name}/seconds_{step}": seconds for w in works for step, seconds in w.findings.seconds.items()}


def _metrics(manifest: Manifest) -> dict[str, float]:
    numbers = ("read", "kept", "bad", "images", "characters")
    metrics: dict[str, float] = {}
    for name, found in manifest.report["sources"].items():
        metrics |= {f"{name}/{number}": float(found[number]) for number in numbers}
        metrics |= {f"{name}/dropped": float(sum(found["dropped"].values()))}
        metrics |= {f"{name}/dropped_{step}": float(count) for step, count in found.get("steps", {}).items()}
    return metrics
