"""One source in a curation: what is known of it, what becomes of it, and what is told and published."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from PIL import ImageOps

from calumma.model.document import Document
from calumma.platform.curation.counts import DocumentCounts
from calumma.platform.curation.report.findings import Findings
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.reports.contact_sheet import Cell, contact_sheet
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources import notes, reading
from calumma.platform.sources.references import unread
from calumma.platform.sources.specification import Source
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run


SHOWN = 5  # bad inputs of a source that a message names; the manifest names more
SAMPLES, SAMPLE_SIDE = 32, 72  # pictures on a contact sheet, and their width in pixels
StagedFile = tuple[str, int, int]  # path, first identity, documents


@dataclass
class SourceJob:
    """One source: its tasks, and their results so far."""

    source: Source
    number: int  # in the specification
    output: str
    specification: CurateSpecification  # that makes this source only: what its manifest records
    fingerprint: str  # fingerprint of that specification and the input files
    inputs: dict[str, str]
    sizes: dict[str, int]
    ignored: dict[str, reading.Unread]
    tasks: list[dict[str, Any]]
    counts: DocumentCounts = field(default_factory=DocumentCounts)
    findings: Findings = field(default_factory=Findings)
    entries: list[FileEntry] = field(default_factory=list)
    staged: list[list[StagedFile]] = field(default_factory=list)  # of every task
    unread_counted: bool = False

    def count_unread(self) -> None:
        """When all is read: what of the location is neither the format's nor referred to by its records."""
        self.ignored = {uri: self.ignored[uri] for uri in unread(self.ignored, self.counts.notes)}
        self.counts.notes.referred.clear()
        if not self.unread_counted:
            for kind, name in self.ignored.values():
                self.counts.notes.skip(kind, name)
        self.unread_counted = True

    def add_result(self, result: dict[str, Any]) -> None:
        """Add what a task returned."""
        self.counts.add(DocumentCounts.model_validate(result["counts"]))
        self.findings.add(Findings.model_validate(result["findings"]))
        self.entries += [FileEntry.model_validate(entry) for entry in result.get("files", ())]

    @property
    def staged_files(self) -> list[StagedFile]:
        return [part for task in self.staged for part in task]

    @property
    def documents_staged(self) -> int:
        return sum(count for _, _, count in self.staged_files)


def failure(spec: CurateSpecification, w: SourceJob, kept: int) -> str | None:
    counts, name = w.counts.model_copy(update={"kept": kept}), w.source.name
    share = counts.bad_share(sum(w.sizes.values()))
    if counts.bad and share > spec.max_bad_share:
        examples = "".join(f"\n  {bad.name}: {bad.reason}" for bad in counts.examples[:SHOWN])
        return (
            f"source {name!r}: {share:.2%} of the input is unreadable ({counts.bad:,} bad, {counts.read:,} read), more "
            f"than max_bad_share allows ({spec.max_bad_share:.2%}); nothing of it was published. For example:{examples}"
            "\nRepair or remove these, or raise max_bad_share."
        )
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.dropped.items()))
        unread = "".join(f"; {line}" for line in notes.sentences(counts.report()))
        return f"source {name!r}: no document is left of {counts.read:,} read" + (
            f" ({reasons}){unread}" if reasons else unread
        )
    return None


def describe_skipped(source: str, report: dict[str, Any]) -> str | None:
    """A message on what of a source was bad or not read, from its part of the manifest's report; None for nothing."""
    told = []
    for count, examples, title in (
        (report.get("bad", 0), "bad_inputs", "unreadable, skipped"),
        (report.get("warned", 0), "warnings", "read in spite of a fault"),
    ):
        named = [f"{example['name']}: {example['reason']}" for example in report.get(examples, [])[:SHOWN]]
        if count > len(named):
            named.append(f"and {count - len(named):,} more (see {examples} in the source's manifest)")
        if count:
            told.append("\n  ".join([f"{count:,} {title}:", *named]))
    return "\n".join(f"source {source!r}: {what}" for what in told + notes.sentences(report)) or None


def publish_source(w: SourceJob, run: Run) -> Manifest:
    manifest = Manifest(
        kind=document_shards.CURATED,
        files=w.entries,
        specification=w.specification.model_dump(mode="json"),
        report={
            "fingerprint": w.fingerprint,
            "files": len(w.sizes),
            "files_ignored": len(w.ignored),
            "bytes": sum(w.sizes.values()),
            "bad_share": w.counts.bad_share(sum(w.sizes.values())),
            **w.counts.report(),
            "steps": {step: sum(reasons.values()) for step, reasons in w.findings.steps.items()},
        },
        inputs=w.inputs,
    )
    publishing.publish(w.output, manifest)
    if w.counts.images:
        run.log_image(sample_sheet(document_shards.read_documents(w.output)), f"samples/{w.source.name}.png")
    return manifest


def sample_sheet(documents: Iterable[Document]) -> PILImage.Image:
    """A contact sheet of the first images, each over its caption or the words of its document."""
    labelled = ((i, i.caption or d.text) for d in documents for i in d.images)
    cells = [
        # Square, because a sheet's cells are: nothing is stretched.
        Cell(
            ImageOps.pad(image.open(), (SAMPLE_SIDE, SAMPLE_SIDE), PILImage.Resampling.NEAREST), " ".join(words.split())
        )
        for image, words in islice(labelled, SAMPLES)
    ]
    return contact_sheet(cells, columns=8, side=SAMPLE_SIDE)


def step_seconds(jobs: list[SourceJob]) -> dict[str, float]:
    """Seconds of each step of each source. Not in the manifest: equal curations have equal manifests."""
    return {f"{w.source.name}/seconds_{step}": seconds for w in jobs for step, seconds in w.findings.seconds.items()}


def metrics_of(manifest: Manifest) -> dict[str, float]:
    numbers = ("read", "kept", "bad", "images", "characters")
    metrics: dict[str, float] = {}
    for name, report in manifest.report["sources"].items():
        metrics |= {f"{name}/{number}": float(report[number]) for number in numbers}
        metrics |= {f"{name}/dropped": float(sum(report["dropped"].values()))}
        metrics |= {f"{name}/dropped_{step}": float(count) for step, count in report.get("steps", {}).items()}
    return metrics
