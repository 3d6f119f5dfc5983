"""Curation: raw files -> checked, ordered documents in Parquet shards, one published directory a source.

A task is a file (or some, where there are very many): it is read, checked, ordered and written in one go, so a
source's shards are the same whatever cluster makes them. A document is either kept, dropped for a named reason, or
bad (unreadable); more bad input than allowed fails the source, which then publishes nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage
from PIL import ImageOps

from calumma.model.document import Document, Image, Text, UnreadableImage, without_layout
from calumma.platform import storage
from calumma.platform.config import CurateSpecification, Source, SpecificationError
from calumma.platform.data import pipeline, shards, sources
from calumma.platform.data.manifest import FileEntry, Manifest, fingerprints
from calumma.platform.data.sources import BadInput
from calumma.platform.data.tally import Tally
from calumma.platform.evaluation.sheet import Cell, contact_sheet
from calumma.platform.progress import Progress

if TYPE_CHECKING:
    from calumma.platform.tracking import Run

logger = logging.getLogger(__name__)

MAX_TASKS = 1024  # a source; with more files than that, neighbours share a task
SHOWN = 5  # bad inputs of a source that a message names; the manifest names more
SAMPLES, SIDE = 32, 72  # pictures on a contact sheet, and their width in pixels


class TooMuchBadInput(ValueError):
    """More of a source is unreadable than its specification allows, or nothing of it is left."""


@dataclass(frozen=True)
class Dropped:
    """A readable document that the specification does not want."""

    reason: str


# -- one document ------------------------------------------------------------------------------------------------------


def prepare(item: sources.Item, spec: CurateSpecification) -> Document | Dropped | BadInput:
    """Check a raw document and put it into its final order."""
    if isinstance(item, BadInput):
        return item
    document = replace(item, segments=without_layout(item.segments))
    if problem := _unreadable(document):
        return problem
    if not document.segments:
        return Dropped("empty")
    if document.is_conversation and all(s.role != "assistant" for s in document.segments):
        return Dropped("conversation without an answer")
    if not document.images and not document.is_conversation and len(document.text.strip()) < spec.min_text:
        return Dropped(f"shorter than {spec.min_text} characters")
    return ordered(document, spec.seed, spec.image_first)


def ordered(document: Document, seed: int, image_first: float) -> Document:
    """A pair (one image with a caption) as image then caption, or caption then image in the other 1 - `image_first` of
    the cases; its content decides, so a rerun decides alike. Other documents keep their order (paper section 2.2)."""
    if len(document.segments) != 1 or not isinstance(image := document.segments[0], Image):
        return document
    if not image.caption or image.role is not None:
        return document
    data = image.data if isinstance(image.data, bytes) else image.png()
    digest = hashlib.sha256(f"{seed}\0{image.caption}\0".encode() + data).digest()
    caption = Text(image.caption)
    first = int.from_bytes(digest[:8]) / 2**64 < image_first
    return replace(document, segments=(image, caption) if first else (caption, image))


def _unreadable(document: Document) -> BadInput | None:
    name = sources.name_of(document)
    texts = [s.text if isinstance(s, Text) else s.caption or "" for s in document.segments]
    for text in (*texts, document.license, document.url):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadInput(name, f"text is not valid Unicode: {error.reason} at character {error.start}")
    images = document.images
    for index, image in enumerate(images):
        try:
            image.open()
        except UnreadableImage as error:
            return BadInput(name if len(images) == 1 else f"{name}, image {index}", str(error))
    return None


# -- one task ----------------------------------------------------------------------------------------------------------


def curate_files(task: dict[str, Any]) -> dict[str, Any]:
    """Read, check, order and write the documents of some files. Raises StorageError.

    `task`: "specification", "source" (its name), "files" (URIs), "output" (the source's URI), "stem" (of shard names).
    Returns {"source", "files": entries written, "tally"}.
    """
    spec = CurateSpecification.model_validate(task["specification"])
    source = next(s for s in spec.sources if s.name == task["source"])
    tally = Tally()
    entries: list[dict[str, Any]] = []
    documents = _kept(task["files"], source, spec, tally)
    for number, shard in enumerate(pipeline.chunks(documents, spec.documents_per_shard)):
        path = pipeline.shard_name(task["stem"], number)
        data = shards.to_parquet(shard)
        storage.write_bytes(storage.join(task["output"], path), data)
        entries.append(FileEntry.of(path, data, rows=len(shard)).model_dump(mode="json"))
    return {"source": source.name, "files": entries, "tally": tally.model_dump(mode="json")}


def _kept(files: list[str], source: Source, spec: CurateSpecification, tally: Tally) -> Iterator[Document]:
    for uri in files:
        for item in sources.read_file(source.format, source.name, uri):
            result = prepare(item, spec)
            if isinstance(result, Document):
                tally.keep(result)
                yield result
            elif isinstance(result, Dropped):
                tally.drop(result.reason)
            else:
                tally.skip(result)


# -- the job -----------------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """What has come back of one source."""

    source: Source
    output: str
    mark: str  # fingerprint of the specification and the input files
    sizes: dict[str, int]
    ignored: list[str]
    tasks: list[dict[str, Any]]
    tally: Tally
    entries: list[FileEntry]


def run(spec: CurateSpecification, run: Run, progress: Progress) -> Manifest:
    """Curate all sources that no equal specification has published. Raises SpecificationError, TooMuchBadInput (after
    the good sources are published) and StorageError."""
    output = spec.locate(spec.output)
    work = [_plan(spec, source) for source in spec.sources]
    published: dict[str, Manifest] = {}
    failures: list[str] = []
    waiting = {w.source.name: w for w in work}
    for w in work:
        manifest = pipeline.standing(w.output, _alone(spec, w.source))
        if manifest is not None and manifest.report["fingerprint"] == w.mark:
            published[w.source.name] = manifest
            del waiting[w.source.name]
    total = sum(len(w.sizes) for w in waiting.values())
    done = 0
    progress(0, total, f"{total:,} files of {len(waiting)} sources")
    tasks = [task for w in waiting.values() for task in w.tasks]
    for task, result in zip(tasks, pipeline.in_order(tasks, curate_files, spec.resources), strict=True):
        w = waiting[result["source"]]
        w.tally.add(Tally.model_validate(result["tally"]))
        w.entries += [FileEntry.model_validate(entry) for entry in result["files"]]
        done += len(task["files"])
        progress(done, total, f"{w.source.name}: {w.tally.kept:,} documents")
        if task is w.tasks[-1]:
            if problem := _problem(spec, w):
                failures.append(problem)
                pipeline.discard(storage.join(w.output, entry.path) for entry in w.entries)
            else:
                manifest = _publish(spec, w, run)
                published[w.source.name] = manifest
                if skipped := unreadable(w.source.name, manifest.report):
                    logger.warning("%s", skipped)
    if failures:
        raise TooMuchBadInput("\n".join(failures))
    manifest = pipeline.together(shards.CURATED, spec, {s.name: published[s.name] for s in spec.sources})
    manifest.write(output)
    run.log_metrics(_metrics(manifest))
    return manifest


def _alone(spec: CurateSpecification, source: Source) -> CurateSpecification:
    """The specification that makes this source only: what its manifest records."""
    return spec.model_copy(update={"sources": [source]})


def _plan(spec: CurateSpecification, source: Source) -> _Work:
    """The tasks of a source. Raises SpecificationError when its location has no files of its format."""
    location = spec.locate(source.location)
    sizes, ignored = sources.list_source(source.format, location)
    if not sizes:
        suffixes = " or ".join(f"*{suffix}" for suffix in sources.FORMATS[source.format].suffixes)
        if ignored:
            names = ", ".join(storage.relative(uri, location) for uri in ignored[:3])
            there = f"there are {len(ignored):,} other files, such as {names}"
        else:
            there = "there is nothing at that location"
        raise SpecificationError(
            f"source {source.name!r} ({source.format}): no {suffixes} files at {location}; {there}"
        )
    output = storage.join(spec.locate(spec.output), source.name)
    alone = _alone(spec, source)
    mark = pipeline.fingerprint(alone, sizes)
    files, size = list(sizes), -(-len(sizes) // MAX_TASKS)
    tasks = [
        {
            "specification": alone.model_dump(mode="json"),
            "source": source.name,
            "files": files[begin : begin + size],
            "output": output,
            "stem": pipeline.stem("documents", mark, number),
        }
        for number, begin in enumerate(range(0, len(files), size))
    ]
    return _Work(source, output, mark, sizes, ignored, tasks, Tally(), [])


def _problem(spec: CurateSpecification, w: _Work) -> str | None:
    tally, name = w.tally, w.source.name
    share = tally.bad_share(sum(w.sizes.values()))
    if tally.bad and share > spec.max_bad_share:
        examples = "".join(f"\n  {bad.name}: {bad.reason}" for bad in tally.examples[:SHOWN])
        return (
            f"source {name!r}: {share:.2%} of the input is unreadable ({tally.bad:,} bad, {tally.read:,} read), more "
            f"than max_bad_share allows ({spec.max_bad_share:.2%}); nothing of it was published. For example:{examples}"
            "\nRepair or remove these, or raise max_bad_share."
        )
    if not tally.kept:
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


def _publish(spec: CurateSpecification, w: _Work, run: Run) -> Manifest:
    alone = _alone(spec, w.source)
    report = {
        "fingerprint": w.mark,
        "files": len(w.sizes),
        "files_ignored": len(w.ignored),
        "bytes": sum(w.sizes.values()),
        "bad_share": w.tally.bad_share(sum(w.sizes.values())),
        **w.tally.report(),
    }
    manifest = Manifest(
        kind=shards.CURATED,
        files=w.entries,
        specification=alone.model_dump(mode="json"),
        report=report,
        inputs=fingerprints([spec.locate(w.source.location)]),
    )
    pipeline.publish(w.output, manifest)
    if w.tally.images:
        run.log_image(samples(shards.read_documents(w.output)), f"samples/{w.source.name}.png")
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


def _metrics(manifest: Manifest) -> dict[str, float]:
    numbers = ("read", "kept", "bad", "images", "characters")
    metrics: dict[str, float] = {}
    for name, report in manifest.report["sources"].items():
        metrics |= {f"{name}/{number}": float(report[number]) for number in numbers}
        metrics |= {f"{name}/dropped": float(sum(report["dropped"].values()))}
    return metrics
