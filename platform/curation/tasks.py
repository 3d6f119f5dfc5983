"""What the workers of a curation do. In one phase: files -> shards. With scores, or steps that look at all documents,
in phases: files -> staged documents, scores, signatures and their comparison, staged documents -> shards."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from calumma.model.document import Document
from calumma.platform import storage
from calumma.platform.cluster.tasks import batched
from calumma.platform.curation.counts import DocumentCounts
from calumma.platform.curation.report.findings import Findings, Redactor, Sample, excerpt
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import duplicates, scoring, staging
from calumma.platform.curation.steps.chain import StepChain, applies, order_pair
from calumma.platform.curation.steps.filters import Dropped
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources import reading
from calumma.platform.sources.files import BadInput
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry


@dataclass
class TaskResult:
    """What became of a task's documents."""

    counts: DocumentCounts = field(default_factory=DocumentCounts)
    findings: Findings = field(default_factory=Findings)

    def keep(self, document: Document, scores: Mapping[str, float] | None = None, copies: int = 1) -> None:
        self.counts.keep(document)
        self.counts.copies += copies - 1
        self.findings.keep(document, scores)

    def drop(
        self,
        document: Document,
        why: Dropped,
        scores: Mapping[str, float] | None = None,
        like: int | None = None,
        redactor: Redactor | None = None,
    ) -> None:
        self.counts.drop(why.reason)
        self.findings.drop(document, why, scores, like, redactor)

    def values(self) -> dict[str, Any]:
        return {"counts": self.counts.model_dump(mode="json"), "findings": self.findings.model_dump(mode="json")}


def curate_files(task: dict[str, Any]) -> dict[str, Any]:
    """Read, check, order and write the documents of some files. Raises StorageError.

    `task`: "specification", "source" (its name), "files" (URIs), "output" (the source's URI), "shard_prefix", "index"
    (of decontamination, or None). Returns {"source", "files": entries written, "counts", "findings"}.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = TaskResult()

    def kept() -> Iterator[Document]:
        for document in _passing_documents(task, spec, outcome):
            document = order_pair(document, spec.seed, spec.image_first)
            outcome.keep(document)
            yield document

    entries = _write_shards(kept(), spec, task)
    return {"source": task["source"], "files": entries, **outcome.values()}


def _passing_documents(task: dict[str, Any], spec: CurateSpecification, outcome: TaskResult) -> Iterator[Document]:
    """Documents that pass the steps which look at one alone."""
    source = next(s for s in spec.sources if s.name == task["source"])
    chain = StepChain(spec, source.name, task["index"], outcome.counts.notes)
    for uri in task["files"]:
        for item in reading.read_source(source, uri, spec.locate, outcome.counts.notes):
            checked = chain(item)
            if isinstance(checked, BadInput):
                outcome.counts.skip(checked)
            elif checked.dropped is not None:
                outcome.drop(checked.document, checked.dropped, redactor=chain.redactor)
            else:
                outcome.findings.images_removed += checked.images_removed
                if checked.scrubbed:
                    outcome.findings.scrubbed(checked.document)
                yield checked.document
    outcome.findings.marks = dict(chain.scrubber.counts) if chain.scrubber is not None else {}
    outcome.findings.add(Findings(seconds=chain.seconds))


def _write_shards(
    documents: Iterator[Document], spec: CurateSpecification, task: dict[str, Any]
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, shard in enumerate(batched(documents, spec.documents_per_shard)):
        path = publishing.shard_name(task["shard_prefix"], number)
        data = document_shards.to_parquet(shard)
        storage.write_bytes(storage.join(task["output"], path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=len(shard)).model_dump(mode="json"))
    return entries


# -- in phases ---------------------------------------------------------------------------------------------------------


def stage_files(task: dict[str, Any]) -> dict[str, Any]:
    """First: what passes the steps that look at one document alone, staged, and signed where nothing is scored.

    `task`: as of `curate_files`, and "root" (where to stage), "place" ([number of the source, of the task]).
    Returns {"source", "staged": [[path, first identity, documents], …], "rows": {kind: signatures}, "counts",
    "findings"}. Raises StorageError.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = TaskResult()
    spool = duplicates.SignatureWriter(task["root"], task["shard_prefix"])
    rules = spec.duplicates if applies(spec.duplicates, task["source"]) and not spec.scorers else None
    source, place = task["place"]
    numbers = itertools.count(staging.document_id(source, place, 0))
    signing = 0.0

    def staged() -> Iterator[tuple[int, Document]]:
        nonlocal signing
        for document in _passing_documents(task, spec, outcome):
            number = next(numbers)
            if rules is not None:
                begin = time.perf_counter()
                spool.add(document, number, rules)
                signing += time.perf_counter() - begin
            yield number, document

    files = []
    for count, part in enumerate(batched(staged(), spec.documents_per_shard)):
        path = f"{task['shard_prefix']}-{count:05d}"
        staging.write_documents(staged_documents_uri(task["root"], path), part)
        files.append([path, part[0][0], len(part)])
    spool.flush()
    if rules is not None:
        outcome.findings.add(Findings(seconds={"duplicates": signing}))
    return {"source": task["source"], "staged": files, "rows": spool.written, **outcome.values()}


def sign_files(task: dict[str, Any]) -> dict[str, Any]:
    """After scoring: signatures of the documents whose scores are wanted. A document dropped by its score makes no
    other a duplicate. Raises StorageError.

    `task`: as of `finish_files`. Returns {"rows": {kind: signatures}, "seconds"}.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    assert spec.duplicates is not None
    begin = time.perf_counter()
    spool = duplicates.SignatureWriter(task["root"], task["shard_prefix"])
    for part in _staged_files(task, spec):
        for number, document, _, unwanted in part.documents:
            if unwanted is None:
                spool.add(document, number, spec.duplicates)
    spool.flush()
    return {"rows": spool.written, "seconds": time.perf_counter() - begin}


def finish_files(task: dict[str, Any]) -> dict[str, Any]:
    """Last: staged documents whose scores are wanted and that are no duplicates, as shards. Raises StorageError.

    `task`: "specification", "source", "staged" (as `stage_files` returned it), "root", "output", "shard_prefix".
    Returns as `curate_files`.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = TaskResult()
    # Copies come after all documents, not beside their original: what is read together should differ.
    repeated: dict[str, dict[int, int]] = {}

    def once() -> Iterator[Document]:
        for part in _staged_files(task, spec):
            found_duplicates = duplicates.read_duplicates(task["root"], part.first, part.first + part.count)
            for number, document, scores, unwanted in part.documents:
                if unwanted is not None:
                    outcome.drop(document, Dropped(unwanted, "scorers"), scores)
                elif (duplicate := found_duplicates.get(number)) is not None:
                    outcome.drop(document, Dropped(duplicate.reason, "duplicates"), scores, duplicate.of)
                else:
                    copies = scoring.copies(document, spec.seed, spec.scorers, scores)
                    if copies > 1:
                        repeated.setdefault(part.path, {})[number] = copies
                    document = order_pair(document, spec.seed, spec.image_first)
                    outcome.keep(document, scores, copies)
                    yield document

    def again() -> Iterator[Document]:
        for copy in itertools.count(2):
            wanted = {
                p: frozenset(n for n, times in times_of.items() if times >= copy) for p, times_of in repeated.items()
            }
            if not any(wanted.values()):
                return
            for path, numbers in wanted.items():
                if numbers:
                    for _, document in staging.read_documents(staged_documents_uri(task["root"], path), numbers):
                        yield order_pair(document, spec.seed, spec.image_first)

    entries = _write_shards(itertools.chain(once(), again()), spec, task)
    return {"source": task["source"], "files": entries, **outcome.values()}


@dataclass(frozen=True)
class _StagedFile:
    """A staged file. `documents`: identity, document, scores, and why these are not wanted."""

    path: str
    first: int
    count: int
    documents: Iterator[tuple[int, Document, dict[str, float], str | None]]


def _staged_files(task: dict[str, Any], spec: CurateSpecification) -> Iterator[_StagedFile]:
    scorers = [name for name, scorer in spec.scorers.items() if applies(scorer, task["source"])]
    for path, first, count in task["staged"]:
        scored = {name: scoring.read_scores(scoring.scores_uri(task["root"], name, path)) for name in scorers}
        yield _StagedFile(path, first, count, _with_scores(staged_documents_uri(task["root"], path), scored, spec))


def _with_scores(
    uri: str, scored: dict[str, dict[int, float]], spec: CurateSpecification
) -> Iterator[tuple[int, Document, dict[str, float], str | None]]:
    for number, document in staging.read_documents(uri):
        scores = {name: values[number] for name, values in scored.items() if number in values}
        yield number, document, scores, scoring.rejection(spec.scorers, scores)


def staged_documents_uri(root: str, path: str) -> str:
    """The URI of a staged file."""
    return storage.join(root, staging.DOCUMENTS, f"{path}.parquet")


def attach_originals(findings: Iterable[Findings], staged: Iterable[tuple[str, int, int]], root: str) -> None:
    """Put beside each duplicate among the samples the document that it is like. Raises StorageError."""
    samples = [
        s
        for source_findings in findings
        for of_one_reason in source_findings.samples.values()
        for s in of_one_reason
        if s.like is not None
    ]
    wanted = {s.like for s in samples if s.like is not None}
    others: dict[int, Sample] = {}
    for path, first, count in staged:
        if numbers := frozenset(number for number in wanted if first <= number < first + count):
            for number, document in staging.read_documents(staged_documents_uri(root, path), numbers):
                others[number] = Sample(rank=0, name=reading.name_of(document), parts=excerpt(document))
    for sample in samples:
        sample.other = others.get(sample.like or 0)
