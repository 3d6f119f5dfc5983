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
from calumma.platform.cluster.tasks import chunks
from calumma.platform.curation.counts import Tally
from calumma.platform.curation.report.findings import Findings, Sample, Veil, shown
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import duplicates, scoring, staging
from calumma.platform.curation.steps.chain import Chain, applies, ordered
from calumma.platform.curation.steps.filters import Dropped
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources import reading
from calumma.platform.sources.files import BadInput
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry


@dataclass
class Outcome:
    """What became of a task's documents."""

    tally: Tally = field(default_factory=Tally)
    findings: Findings = field(default_factory=Findings)

    def keep(self, document: Document, scores: Mapping[str, float] | None = None, copies: int = 1) -> None:
        self.tally.keep(document)
        self.tally.copies += copies - 1
        self.findings.keep(document, scores)

    def drop(
        self,
        document: Document,
        why: Dropped,
        scores: Mapping[str, float] | None = None,
        like: int | None = None,
        veil: Veil | None = None,
    ) -> None:
        self.tally.drop(why.reason)
        self.findings.drop(document, why, scores, like, veil)

    def values(self) -> dict[str, Any]:
        return {"tally": self.tally.model_dump(mode="json"), "findings": self.findings.model_dump(mode="json")}


def curate_files(task: dict[str, Any]) -> dict[str, Any]:
    """Read, check, order and write the documents of some files. Raises StorageError.

    `task`: "specification", "source" (its name), "files" (URIs), "output" (the source's URI), "stem" (of shard names),
    "index" (of decontamination, or None). Returns {"source", "files": entries written, "tally", "findings"}.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = Outcome()

    def kept() -> Iterator[Document]:
        for document in _passed(task, spec, outcome):
            document = ordered(document, spec.seed, spec.image_first)
            outcome.keep(document)
            yield document

    entries = _write(kept(), spec, task)
    return {"source": task["source"], "files": entries, **outcome.values()}


def _passed(task: dict[str, Any], spec: CurateSpecification, outcome: Outcome) -> Iterator[Document]:
    """Documents that pass the steps which look at one alone."""
    source = next(s for s in spec.sources if s.name == task["source"])
    chain = Chain(spec, source.name, task["index"])
    for uri in task["files"]:
        for item in reading.read_source(source, uri, spec.locate):
            checked = chain(item)
            if isinstance(checked, BadInput):
                outcome.tally.skip(checked)
            elif checked.dropped is not None:
                outcome.drop(checked.document, checked.dropped, veil=chain.veil)
            else:
                outcome.findings.images_removed += checked.images_removed
                if checked.scrubbed:
                    outcome.findings.scrubbed(checked.document)
                yield checked.document
    outcome.findings.marks = dict(chain.scrubber.found) if chain.scrubber is not None else {}
    outcome.findings.add(Findings(seconds=chain.seconds))


def _write(documents: Iterator[Document], spec: CurateSpecification, task: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for number, shard in enumerate(chunks(documents, spec.documents_per_shard)):
        path = publishing.shard_name(task["stem"], number)
        data = document_shards.to_parquet(shard)
        storage.write_bytes(storage.join(task["output"], path), data)
        entries.append(FileEntry.of(path, data, rows=len(shard)).model_dump(mode="json"))
    return entries


# -- in phases ---------------------------------------------------------------------------------------------------------


def stage_files(task: dict[str, Any]) -> dict[str, Any]:
    """First: what passes the steps that look at one document alone, staged, and signed where nothing is scored.

    `task`: as of `curate_files`, and "root" (where to stage), "place" ([number of the source, of the task]).
    Returns {"source", "staged": [[path, first identity, documents], …], "rows": {kind: signatures}, "tally",
    "findings"}. Raises StorageError.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = Outcome()
    spool = duplicates.Spool(task["root"], task["stem"])
    rules = spec.duplicates if applies(spec.duplicates, task["source"]) and not spec.scorers else None
    source, place = task["place"]
    numbers = itertools.count(staging.identity(source, place, 0))
    signing = 0.0

    def staged() -> Iterator[tuple[int, Document]]:
        nonlocal signing
        for document in _passed(task, spec, outcome):
            number = next(numbers)
            if rules is not None:
                begin = time.perf_counter()
                spool.sign(document, number, rules)
                signing += time.perf_counter() - begin
            yield number, document

    files = []
    for count, part in enumerate(chunks(staged(), spec.documents_per_shard)):
        path = f"{task['stem']}-{count:05d}"
        staging.write_documents(document_file(task["root"], path), part)
        files.append([path, part[0][0], len(part)])
    spool.flush()
    if rules is not None:
        outcome.findings.add(Findings(seconds={"duplicates": signing}))
    return {"source": task["source"], "staged": files, "rows": spool.written, **outcome.values()}


def sign_files(task: dict[str, Any]) -> dict[str, Any]:
    """After scoring: signatures of the documents whose scores are wanted. What goes by its score keeps no other from
    staying. `task`: as of `finish_files`. Returns {"rows": {kind: signatures}, "seconds"}. Raises StorageError."""
    spec = CurateSpecification.model_validate(task["specification"])
    assert spec.duplicates is not None
    begin = time.perf_counter()
    spool = duplicates.Spool(task["root"], task["stem"])
    for part in _staged(task, spec):
        for number, document, _, unwanted in part.documents:
            if unwanted is None:
                spool.sign(document, number, spec.duplicates)
    spool.flush()
    return {"rows": spool.written, "seconds": time.perf_counter() - begin}


def finish_files(task: dict[str, Any]) -> dict[str, Any]:
    """Last: staged documents whose scores are wanted and that are no duplicates, as shards. Raises StorageError.

    `task`: "specification", "source", "staged" (as `stage_files` returned it), "root", "output", "stem".
    Returns as `curate_files`.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    outcome = Outcome()
    # Copies come after all documents, not beside their original: what is read together should differ.
    repeated: dict[str, dict[int, int]] = {}

    def once() -> Iterator[Document]:
        for part in _staged(task, spec):
            twins = duplicates.dropped(task["root"], part.first, part.first + part.count)
            for number, document, scores, unwanted in part.documents:
                if unwanted is not None:
                    outcome.drop(document, Dropped(unwanted, "scorers"), scores)
                elif (twin := twins.get(number)) is not None:
                    outcome.drop(document, Dropped(twin.reason, "duplicates"), scores, twin.of)
                else:
                    copies = scoring.copies(document, spec.seed, spec.scorers, scores)
                    if copies > 1:
                        repeated.setdefault(part.path, {})[number] = copies
                    document = ordered(document, spec.seed, spec.image_first)
                    outcome.keep(document, scores, copies)
                    yield document

    def again() -> Iterator[Document]:
        for copy in itertools.count(2):
            wanted = {p: frozenset(n for n, times in found.items() if times >= copy) for p, found in repeated.items()}
            if not any(wanted.values()):
                return
            for path, numbers in wanted.items():
                if numbers:
                    for _, document in staging.read_documents(document_file(task["root"], path), numbers):
                        yield ordered(document, spec.seed, spec.image_first)

    entries = _write(itertools.chain(once(), again()), spec, task)
    return {"source": task["source"], "files": entries, **outcome.values()}


@dataclass(frozen=True)
class _Part:
    """A staged file. `documents`: identity, document, scores, and why these are not wanted."""

    path: str
    first: int
    count: int
    documents: Iterator[tuple[int, Document, dict[str, float], str | None]]


def _staged(task: dict[str, Any], spec: CurateSpecification) -> Iterator[_Part]:
    scorers = [name for name, scorer in spec.scorers.items() if applies(scorer, task["source"])]
    for path, first, count in task["staged"]:
        scored = {name: scoring.read(scoring.place(task["root"], name, path)) for name in scorers}
        yield _Part(path, first, count, _with_scores(document_file(task["root"], path), scored, spec))


def _with_scores(
    uri: str, scored: dict[str, dict[int, float]], spec: CurateSpecification
) -> Iterator[tuple[int, Document, dict[str, float], str | None]]:
    for number, document in staging.read_documents(uri):
        scores = {name: values[number] for name, values in scored.items() if number in values}
        yield number, document, scores, scoring.unwanted(spec.scorers, scores)


def document_file(root: str, path: str) -> str:
    """The URI of a staged file."""
    return storage.join(root, staging.DOCUMENTS, f"{path}.parquet")


def show_others(findings: Iterable[Findings], staged: Iterable[tuple[str, int, int]], root: str) -> None:
    """Put beside each duplicate among the samples the document that it is like. Raises StorageError."""
    samples = [s for found in findings for part in found.samples.values() for s in part if s.like is not None]
    wanted = {s.like for s in samples if s.like is not None}
    others: dict[int, Sample] = {}
    for path, first, count in staged:
        if numbers := frozenset(number for number in wanted if first <= number < first + count):
            for number, document in staging.read_documents(document_file(root, path), numbers):
                others[number] = Sample(rank=0, name=reading.name_of(document), parts=shown(document))
    for sample in samples:
        sample.other = others.get(sample.like or 0)
