"""Curation: raw files -> checked, ordered documents in Parquet shards, one published directory a source.

A task is a file (or some, where there are very many), so a source's shards are the same whatever cluster makes them. A
document is either kept, dropped for a named reason, or bad (unreadable); more bad input than allowed fails the source,
which then publishes nothing.

Where every step looks at one document alone, a task reads, checks and writes in one go. Scores and duplicates take
phases (see calumma.platform.curation.tasks). Of duplicates the earlier stays, by the order of sources, files and
places; they are looked for last, so that no document is dropped for one that is itself dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calumma.platform import storage
from calumma.platform.cluster import capacity
from calumma.platform.cluster.progress import Progress
from calumma.platform.cluster.tasks import map_in_order
from calumma.platform.curation import tasks
from calumma.platform.curation.report import publish
from calumma.platform.curation.report.findings import Findings
from calumma.platform.curation.source_job import (
    SourceJob,
    describe_skipped,
    failure,
    metrics_of,
    publish_source,
    step_seconds,
)
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import chain, decontaminate, duplicates, scoring, staging
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources import reading
from calumma.platform.sources.specification import Source
from calumma.platform.specification import Resources
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.fingerprints import fingerprints, reusable_result

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run

logger = logging.getLogger(__name__)

MAX_TASKS = 1024  # a source; with more files than that, neighbours share a task


class TooMuchBadInput(ValueError):
    """More of a source is unreadable than its specification allows, or nothing of it is left."""


_SourceTasks = list[tuple[SourceJob, dict[str, Any]]]


def run(spec: CurateSpecification, run: Run, progress: Progress) -> Manifest:
    """Curate all sources that no equal specification has published. Raises SpecificationError, TooMuchBadInput (after
    the good sources are published), ScorerFailed and StorageError."""
    chain.check_names(spec)
    for name in spec.scorers:
        _require_workers(spec, _scorer_resources(spec, name))
    jobs = _plan(spec)
    published = _reusable_results(spec, jobs)
    waiting = [w for w in jobs if w.source.name not in published]
    output = spec.locate(spec.output)
    fingerprint = publishing.fingerprint(spec, {w.source.name: w.fingerprint for w in jobs})
    with staging.staging_folder(output, fingerprint) if waiting and _needs_staging(spec) else nullcontext("") as root:
        index = _build_index(spec, root) if waiting else None
        curation = _Curation(spec, run, progress, root, index)
        if spec.duplicates is not None or spec.scorers:
            published |= curation.in_phases(waiting)
        else:
            published |= curation.one_phase(waiting)
    manifest = publishing.combined_manifest(
        document_shards.CURATED, spec, {s.name: published[s.name] for s in spec.sources}
    )
    manifest.write(output)
    publish.write(output, manifest, {w.source.name: w.findings for w in waiting}, run)
    run.log_metrics(metrics_of(manifest) | step_seconds(waiting))
    return manifest


def _needs_staging(spec: CurateSpecification) -> bool:
    return any((spec.duplicates, spec.scorers, spec.decontaminate))


def _scorer_resources(spec: CurateSpecification, scorer: str) -> Resources:
    return spec.resources if spec.resources.max_workers == 0 else spec.scorers[scorer].resources


def _require_workers(spec: CurateSpecification, resources: Resources) -> None:
    if resources.max_workers:
        capacity.require_workers(resources)


# -- planning ---------------------------------------------------------------------------------------------------------


def _plan(spec: CurateSpecification) -> list[SourceJob]:
    """The tasks of all sources. Raises SpecificationError when a location has no files of its format."""
    listed = {source.name: reading.require_files(source, spec.locate) for source in spec.sources}
    steps = (spec.licenses, spec.domains)
    lists = [spec.locate(step.deny_file) for step in steps if step is not None and step.deny_file]
    against = [spec.locate(location) for location in spec.decontaminate.against] if spec.decontaminate else []
    fingerprints_of = fingerprints([spec.locate(source.location) for source in spec.sources] + lists + against)
    jobs = []
    for number, source in enumerate(spec.sources):
        specification = _source_specification(spec, source)
        sizes, ignored = listed[source.name]
        inputs = {
            uri: fingerprints_of[uri]
            for uri in [*(spec.locate(s.location) for s in specification.sources), *lists, *against]
        }
        everything = {uri: size for s in specification.sources for uri, size in listed[s.name][0].items()}
        fingerprint = publishing.fingerprint(specification, everything | inputs)  # an equal size is no equal content
        output = storage.join(spec.locate(spec.output), source.name)
        files, size = list(sizes), -(-len(sizes) // MAX_TASKS)
        source_tasks = [
            {
                "specification": spec.model_dump(mode="json"),
                "source": source.name,
                "place": [number, place],
                "files": files[begin : begin + size],
                "output": output,
                "shard_prefix": publishing.shard_prefix("documents", fingerprint, place),
            }
            for place, begin in enumerate(range(0, len(files), size))
        ]
        job = SourceJob(source, number, output, specification, fingerprint, inputs, sizes, ignored, source_tasks)
        jobs.append(job)
    return jobs


def _source_specification(spec: CurateSpecification, source: Source) -> CurateSpecification:
    """The specification on which this source's documents depend: of it and, where duplicates of earlier sources go, of
    those."""
    names = [s.name for s in spec.sources]
    if spec.duplicates is None or not chain.applies(spec.duplicates, source.name):
        return spec.only([source.name])
    earlier = [name for name in names[: names.index(source.name)] if chain.applies(spec.duplicates, name)]
    return spec.only([*earlier, source.name])


def _reusable_results(spec: CurateSpecification, jobs: list[SourceJob]) -> dict[str, Manifest]:
    """Manifests of the sources that need not be made again."""
    published: dict[str, Manifest] = {}
    for w in jobs:
        manifest = reusable_result(w.output, w.specification)
        if manifest is not None and manifest.report["fingerprint"] == w.fingerprint:
            published[w.source.name] = manifest
    # Sources whose documents are compared are made together.
    compared = [w.source.name for w in jobs if chain.applies(spec.duplicates, w.source.name)]
    if not all(name in published for name in compared):
        published = {name: manifest for name, manifest in published.items() if name not in compared}
    return published


def _build_index(spec: CurateSpecification, root: str) -> str | None:
    """Where the index of evaluation sets is, made now. Raises SpecificationError and StorageError."""
    if spec.decontaminate is None:
        return None
    task = {
        "rules": spec.decontaminate.model_dump(mode="json"),
        "against": [spec.locate(location) for location in spec.decontaminate.against],
        "output": root,
        "index": storage.join(root, "evaluation.npz"),
    }
    for _ in map_in_order([task], decontaminate.build_index, spec.resources):
        pass
    return str(task["index"])


# -- running -----------------------------------------------------------------------------------------------------------


@dataclass
class _Curation:
    spec: CurateSpecification
    run: Run
    progress: Progress
    root: str  # of what is staged
    index: str | None
    phase: int = 0
    phases: int = 1

    def one_phase(self, jobs: list[SourceJob]) -> dict[str, Manifest]:
        """Raises TooMuchBadInput when all good sources are published."""
        pairs = [(w, {**task, "index": self.index}) for w in jobs for task in w.tasks]
        return self._run_and_publish(jobs, pairs, tasks.curate_files)

    def in_phases(self, jobs: list[SourceJob]) -> dict[str, Manifest]:
        """Raises TooMuchBadInput after the first phase when any source is too bad, since others depend on it."""
        spec, root = self.spec, self.root
        compared = [w for w in jobs if chain.applies(spec.duplicates, w.source.name)]
        self.phases = 2 + len(spec.scorers) + bool(compared) + bool(compared and spec.scorers)
        rows: Counter[str] = Counter()
        staging_tasks = [(w, {**task, "index": self.index, "root": root}) for w in jobs for task in w.tasks]
        for w, _, result in self._run_file_tasks(staging_tasks, tasks.stage_files, len(jobs)):
            w.add_result(result)
            w.staged.append([(path, first, count) for path, first, count in result["staged"]])
            rows.update(result["rows"])
        for w in jobs:
            w.count_unread()
        if failures := [problem for w in jobs if (problem := failure(spec, w, w.documents_staged))]:
            raise TooMuchBadInput("\n".join(failures))
        for name, scorer in spec.scorers.items():
            scored = [
                (w, task) for w in jobs if chain.applies(scorer, w.source.name) for task in self._scoring_tasks(w, name)
            ]
            arguments = {"specification": spec.model_dump(mode="json"), "name": name}
            results = self._run_tasks(
                [task for _, task in scored], scoring.ScoringActor, _scorer_resources(spec, name), name, arguments
            )
            for (w, _), result in zip(scored, results, strict=True):
                w.findings.add(Findings(seconds={"scorers": result["seconds"]}))
        if compared and spec.scorers:
            for w, _, result in self._run_file_tasks(self._staged_tasks(compared), tasks.sign_files, len(compared)):
                rows.update(result["rows"])
                w.findings.add(Findings(seconds={"duplicates": result["seconds"]}))
        if compared and spec.duplicates is not None:
            comparisons = duplicates.comparison_tasks(root, spec.locate(spec.output), spec.duplicates, rows)
            self._run_tasks(comparisons, duplicates.find_duplicates, spec.resources, "duplicates")
        published = self._run_and_publish(jobs, self._staged_tasks(jobs), tasks.finish_files)
        tasks.attach_originals([w.findings for w in jobs], [part for w in jobs for part in w.staged_files], root)
        return published

    def _run_and_publish(self, jobs: list[SourceJob], pairs: _SourceTasks, work: Any) -> dict[str, Manifest]:
        """Run the tasks that write shards. Raises TooMuchBadInput when all good sources are published."""
        published: dict[str, Manifest] = {}
        failures: list[str] = []
        for w, task, result in self._run_file_tasks(pairs, work, len(jobs)):
            w.add_result(result)
            if task["place"] != w.tasks[-1]["place"]:
                continue
            w.count_unread()
            if problem := failure(self.spec, w, w.counts.kept):
                failures.append(problem)
                publishing.delete_files(storage.join(w.output, entry.path) for entry in w.entries)
                continue
            published[w.source.name] = manifest = publish_source(w, self.run)
            if skipped := describe_skipped(w.source.name, manifest.report):
                logger.warning("%s", skipped)
        if failures:
            raise TooMuchBadInput("\n".join(failures))
        return published

    def _staged_tasks(self, jobs: list[SourceJob]) -> _SourceTasks:
        return [
            (w, {**task, "staged": staged, "root": self.root})
            for w in jobs
            for task, staged in zip(w.tasks, w.staged, strict=True)
        ]

    def _scoring_tasks(self, w: SourceJob, name: str) -> Iterator[dict[str, Any]]:
        for path, _, _ in w.staged_files:
            scores = scoring.scores_uri(self.root, name, path)
            yield {"file": tasks.staged_documents_uri(self.root, path), "scores": scores, "output": w.output}

    def _run_file_tasks(
        self, pairs: _SourceTasks, work: Any, count: int
    ) -> Iterator[tuple[SourceJob, dict[str, Any], dict[str, Any]]]:
        """Results of tasks over files, in order."""
        total = sum(len(task["files"]) for _, task in pairs)
        done = 0
        self._report_progress(0, total, f"{total:,} files of {count} sources")
        results = map_in_order([task for _, task in pairs], work, self.spec.resources)
        for (w, task), result in zip(pairs, results, strict=True):
            yield w, task, result
            done += len(task["files"])
            self._report_progress(done, total, f"{w.source.name}: {w.counts.kept:,} documents")
        self.phase += 1

    def _run_tasks(
        self, items: list[Any], work: Any, resources: Resources, note: str, arguments: dict[str, Any] | None = None
    ) -> list[Any]:
        results = []
        for result in map_in_order(items, work, resources, arguments):
            results.append(result)
            self._report_progress(len(results), len(items), note)
        self.phase += 1
        return results

    def _report_progress(self, done: int, total: int, note: str) -> None:
        self.progress(self.phase * total + done, self.phases * total, note)
