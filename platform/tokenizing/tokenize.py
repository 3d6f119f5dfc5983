"""Tokenization: curated documents -> packed token shards, one published directory for each directory of documents.

A task is a window (actor.py): shards with about `window` documents, drawn from the whole directory by the seed. Its
documents are encoded, shuffled, packed into rows of context + 1 tokens, and written as shards whose row groups are
micro-batches. What a window becomes depends on the window and the seed alone, so a job that was killed leaves its
finished windows, with their receipts, to the next one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from calumma.model.config import ImageTokenizerConfig
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.cluster.tasks import map_in_order
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards import receipts
from calumma.platform.shards.receipts import Receipt
from calumma.platform.specification import SpecificationError, basename
from calumma.platform.storage import publishing
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.actor import TokenizingActor, UnusableDocuments
from calumma.platform.tokenizing.specification import TokenizeSpecification
from calumma.platform.tracking.fingerprints import fingerprints, reusable_result

if TYPE_CHECKING:
    from calumma.platform.tracking.run import Run

TOKENS = "tokens"  # Manifest.kind
T = TypeVar("T")


@dataclass
class _Directory:
    """One entry of `documents`: its tasks, and their receipts so far."""

    location: str
    documents: str
    output: str
    receipts: str  # folder
    rows: int
    inputs: dict[str, str]
    tasks: list[dict[str, Any]]
    finished: dict[str, Receipt] = field(default_factory=dict)  # by the task's prefix of shard names

    @property
    def complete(self) -> bool:
        return len(self.finished) == len(self.tasks)

    @property
    def counts(self) -> Counter[str]:
        return sum((receipt.counts for receipt in self.finished.values()), Counter())


def run(spec: TokenizeSpecification, run: Run, progress: Progress) -> Manifest:
    """Tokenize all documents that no equal specification has published, from inputs that are still the same, and of
    those only what a killed job has not done. Raises SpecificationError, UnusableDocuments, ShardError, StorageError.
    """
    directories = _plan(spec)
    published: dict[str, Manifest] = {}
    waiting: list[_Directory] = []
    for directory in directories:
        if (
            manifest := reusable_result(directory.output, _directory_specification(spec, directory.location))
        ) is not None:
            published[directory.output] = manifest
            _delete_leftovers(directory, manifest)  # where a job was killed after the manifest
        else:
            shard_prefixes = {task["shard_prefix"] for task in directory.tasks}
            directory.finished = receipts.finished_receipts(directory.output, directory.receipts, shard_prefixes)
            waiting.append(directory)
    total = sum(directory.rows for directory in waiting)
    done = sum(directory.counts["documents"] for directory in waiting)
    resumed = f", {done:,} of them done before" if done else ""
    progress(done, total, f"{total:,} documents of {len(waiting)} sources{resumed}")
    tasks = [(d, task) for d in waiting for task in d.tasks if task["shard_prefix"] not in d.finished]
    arguments = {"specification": spec.model_dump(mode="json")}
    for directory in waiting:
        if directory.complete:
            published[directory.output] = _publish(spec, directory)
    # Closed when something goes wrong here, so that the actors stop at once.
    with closing(map_in_order([task for _, task in tasks], TokenizingActor, spec.resources, arguments)) as results:
        for (directory, task), result in zip(tasks, results, strict=True):
            receipt = directory.finished[task["shard_prefix"]] = Receipt.model_validate(result)
            done += receipt.counts["documents"]
            progress(done, total, basename(directory.location))
            if directory.complete:
                published[directory.output] = _publish(spec, directory)
                progress(done, total, _summary(directory, published[directory.output]))
    manifest = publishing.combined_manifest(
        TOKENS, spec, {basename(d.location): published[d.output] for d in directories}
    )
    manifest.write(spec.locate(spec.output))
    publishing.delete_unfinished_files(spec.locate(spec.output))
    run.log_metrics(_metrics(manifest))
    return manifest


def _directory_specification(spec: TokenizeSpecification, location: str) -> TokenizeSpecification:
    """The specification that makes this directory only: what its manifest records."""
    return spec.model_copy(update={"documents": [location]})


def _plan(spec: TokenizeSpecification) -> list[_Directory]:
    """What to do, with everything checked that needs no cluster. Raises SpecificationError and StorageError."""
    image_length = _image_length(spec)
    directories = []
    for location in spec.documents:
        documents, name = spec.locate(location), basename(location)
        manifest = document_shards.curated_manifest(documents)
        if image_length > spec.context + 1 and _image_count(manifest):
            raise SpecificationError(
                f"context: {spec.context} is too short for the {image_length} tokens of an image, and {documents} has "
                f"{_image_count(manifest):,} images; set at least {image_length - 1}"
            )
        inputs = fingerprints([documents, spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)])
        fingerprint = publishing.fingerprint(_directory_specification(spec, location), inputs)
        output = storage.join(spec.locate(spec.output), name)
        folder = storage.join(spec.locate(spec.output), receipts.FOLDER, name)
        tasks = []
        shards = document_shards.shards(documents, manifest)
        for number, window in enumerate(windows(shards, manifest.rows, spec.window, spec.seed)):
            shard_prefix = publishing.shard_prefix("tokens", fingerprint, number)
            tasks.append(
                {
                    "shards": window,
                    "seed": _window_seed(spec.seed, name, number),
                    "output": output,
                    "shard_prefix": shard_prefix,
                    "receipt": receipts.receipt_uri(folder, shard_prefix),
                }
            )
        directories.append(_Directory(location, documents, output, folder, manifest.rows, inputs, tasks))
    return directories


def _image_length(spec: TokenizeSpecification) -> int:
    """Tokens of an image. Raises SpecificationError when a tokenizer is missing or the two do not agree."""
    text, image = spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)
    try:
        vocabulary = Vocabulary.model_validate_json(storage.read_bytes(storage.join(text, "vocabulary.json")))
    except storage.NotFound as error:
        raise SpecificationError(f"text_tokenizer: none at {text}; run the job train_text_tokenizer first") from error
    try:
        config = ImageTokenizerConfig.model_validate_json(storage.read_bytes(storage.join(image, "config.json")))
    except storage.NotFound as error:
        raise SpecificationError(
            f"image_tokenizer: none at {image}; run the job train_image_tokenizer first"
        ) from error
    if len(vocabulary.image_codes) != config.codebook_size:
        raise SpecificationError(
            f"text_tokenizer: {text} has ids for {len(vocabulary.image_codes):,} image codes, and the image tokenizer "
            f"{image} has a codebook of {config.codebook_size:,}; train the text tokenizer with as many image_codes"
        )
    return config.codes_per_image + 2


def _image_count(manifest: Manifest) -> int:
    reports = manifest.report.get("sources", {"": manifest.report})
    return sum(report.get("images", 0) for report in reports.values())


def windows(shards: Sequence[T], documents: int, size: int, seed: int) -> list[list[T]]:
    """Shards dealt to windows of about `size` documents, in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(len(shards))
    count = min(len(shards), max(1, documents // size))
    return [[shards[i] for i in order[number::count]] for number in range(count)]


def _window_seed(seed: int, name: str, window: int) -> list[int]:
    return [seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]), window]


def _publish(spec: TokenizeSpecification, directory: _Directory) -> Manifest:
    done = [directory.finished[task["shard_prefix"]] for task in directory.tasks]
    dropped = sum((receipt.dropped for receipt in done), Counter[str]())
    if not any(receipt.files for receipt in done):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
        raise UnusableDocuments(
            f"{directory.documents}: none of its documents fits a context of {spec.context}: {reasons or 'it is empty'}"
        )
    manifest = Manifest(
        kind=TOKENS,
        files=[entry for receipt in done for entry in receipt.files],
        specification=_directory_specification(spec, directory.location).model_dump(mode="json"),
        inputs=directory.inputs,
    )
    counts = directory.counts
    longer = counts["split"] + sum(dropped.values())
    manifest.report = {
        "documents": counts["documents"],
        "split": counts["split"],
        "dropped": dict(dropped),
        "longer_than_context": longer,
        "truncated_share": longer / counts["documents"],
        "sequences": counts["sequences"],
        "rows": manifest.rows,
        "row_groups": manifest.row_groups,
        "tokens": manifest.tokens,
        "trained": counts["trained"],
        "padding_share": counts["padding"] / (manifest.rows * (spec.context + 1)),
    }
    manifest.write(directory.output)
    _delete_leftovers(directory, manifest)
    return manifest


def _delete_leftovers(directory: _Directory, manifest: Manifest) -> None:
    """Delete what a published directory no longer needs: earlier shards, and the receipts."""
    publishing.delete_stale_shards(directory.output, (entry.path for entry in manifest.files))
    receipts.delete_receipts(directory.receipts)


def _summary(directory: _Directory, manifest: Manifest) -> str:
    report = manifest.report
    return (
        f"{basename(directory.location)}: {report['padding_share']:.1%} padding, "
        f"{report['truncated_share']:.1%} of the documents longer than the context"
    )


def _metrics(manifest: Manifest) -> dict[str, float]:
    numbers = ("documents", "rows", "padding_share", "longer_than_context", "truncated_share", "split")
    metrics: dict[str, float] = {}
    for name, report in manifest.report["sources"].items():
        metrics |= {f"{name}/{n}": float(report[n]) for n in numbers}
        metrics |= {f"{name}/dropped": float(sum(report["dropped"].values()))}
        metrics |= {f"{name}/{modality}_tokens": float(count) for modality, count in report["tokens"].items()}
    return metrics
