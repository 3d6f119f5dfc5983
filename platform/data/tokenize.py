"""Tokenization: curated documents -> packed token shards, one published directory for each directory of documents.

A task is a window: shards with about a thousand documents, drawn from the whole directory by the seed. Its documents
are encoded, shuffled, packed into rows of context + 1 tokens, and written as shards whose row groups are micro-batches.
What a window becomes depends on the window and the seed alone.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calumma.model.config import ImageTokenizerConfig
from calumma.model.encoding import DocumentEncoder, Encoded
from calumma.model.image_tokenizer import ImageTokenizer
from calumma.model.text_tokenizer import TextTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.config import SpecificationError, TokenizeSpecification, last_part
from calumma.platform.data import pipeline, shards
from calumma.platform.data.manifest import FileEntry, Manifest, fingerprints
from calumma.platform.data.packing import ImageTooLong, PackedRow, pack, split
from calumma.platform.progress import Progress

if TYPE_CHECKING:
    from calumma.platform.tracking import Run

TOKENS = "tokens"  # Manifest.kind
WINDOW = 1000  # documents, at least, where there are so many
ENCODED_AT_ONCE = 64  # documents whose images are coded together


class DocumentsUnusable(ValueError):
    """Curated documents that cannot become tokens."""


# -- one window --------------------------------------------------------------------------------------------------------


class Tokenizer:
    """What an actor holds: the tokenizers, read once. Calling it does one window."""

    def __init__(self, text_tokenizer: str, image_tokenizer: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        with storage.local_copy(text_tokenizer) as text, storage.local_copy(image_tokenizer) as image:
            self.encoder = DocumentEncoder(
                Vocabulary.read(text), TextTokenizer.read(text), ImageTokenizer.read(image, device)
            )

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        return tokenize_window(self.encoder, task)


def tokenize_window(encoder: DocumentEncoder, task: dict[str, Any]) -> dict[str, Any]:
    """Encode, pack and write the documents of some shards. Raises DocumentsUnusable and StorageError.

    `task`: "specification", "shards" (URIs), "seed" (of its order), "output" (URI), "stem" (of shard names).
    Returns {"files": entries written, "counts": numbers to add up, "dropped": reason -> documents}.
    """
    spec = TokenizeSpecification.model_validate(task["specification"])
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    sequences: list[Encoded] = []
    for uri in task["shards"]:
        for conversation, encoded in _encoded(encoder, uri):
            counts["documents"] += 1
            pieces = fit(encoded, conversation, spec.context + 1, encoder.vocabulary)
            if isinstance(pieces, str):
                dropped[pieces] += 1
                continue
            counts["split"] += len(pieces) > 1
            sequences += pieces
    random = np.random.default_rng(task["seed"])
    sequences = [sequences[i] for i in random.permutation(len(sequences))]
    rows = pack(sequences, spec.context + 1, encoder.vocabulary.pad)
    rows = [rows[i] for i in random.permutation(len(rows))]
    counts["sequences"] = len(sequences)
    counts["padding"] = sum(row.padding for row in rows)
    counts["trained"] = sum(row.trained for row in rows)
    image_ids = np.asarray(encoder.vocabulary.image_ids, dtype=np.int32)
    entries = []
    for number, shard in enumerate(pipeline.chunks(rows, spec.micro_batch * spec.micro_batches_per_shard)):
        path = pipeline.shard_name(task["stem"], number)
        data = to_parquet(shard, spec.micro_batch)
        storage.write_bytes(storage.join(task["output"], path), data)
        entry = FileEntry.of(
            path,
            data,
            rows=len(shard),
            row_groups=-(-len(shard) // spec.micro_batch),
            tokens=modalities(shard, image_ids),
            sequences_per_row_group=spec.micro_batch,
        )
        entries.append(entry.model_dump(mode="json"))
    return {"files": entries, "counts": dict(counts), "dropped": dict(dropped)}


def _encoded(encoder: DocumentEncoder, uri: str) -> Iterator[tuple[bool, Encoded]]:
    """(whether it is a conversation, its tokens) of each document of a shard."""
    for documents in pipeline.chunks(shards.read_shard(uri), ENCODED_AT_ONCE):
        try:
            encoded = encoder.encode_many(documents)
        except ValueError as error:
            raise DocumentsUnusable(f"{uri}: a document cannot be encoded: {error}; curate it again") from error
        yield from zip((d.is_conversation for d in documents), encoded, strict=True)


def fit(encoded: Encoded, conversation: bool, length: int, vocabulary: Vocabulary) -> list[Encoded] | str:
    """A document as sequences of at most `length` tokens, or the reason why it is dropped."""
    if len(encoded.ids) <= length:
        return [encoded]
    if conversation:
        return "conversation longer than the context"
    try:
        return split(encoded, length, vocabulary)
    except ImageTooLong:
        return "image longer than the context"


def to_parquet(rows: Sequence[PackedRow], micro_batch: int) -> bytes:
    """A token shard's bytes (zstd): a row group for every `micro_batch` rows, the last may be smaller."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ints, bools = pa.list_(pa.int32()), pa.list_(pa.bool_())
    schema = pa.schema([("tokens", ints), ("loss_mask", bools), ("segments", ints)])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        for group in pipeline.chunks(rows, micro_batch):
            columns = [
                pa.array([row.tokens for row in group], ints),
                pa.array([row.loss_mask for row in group], bools),
                pa.array([row.segments for row in group], ints),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=micro_batch)
    return buffer.getvalue()


def modalities(rows: Sequence[PackedRow], image_ids: np.ndarray) -> dict[str, int]:
    """Tokens without padding: image codes, and everything else (text and special tokens) as text."""
    image = sum(int(np.isin(row.tokens, image_ids).sum()) for row in rows)
    return {"text": sum(len(row.tokens) - row.padding for row in rows) - image, "image": image}


# -- the job -----------------------------------------------------------------------------------------------------------


@dataclass
class _Directory:
    """One entry of `documents`, and what has come back of it."""

    location: str
    documents: str
    output: str
    rows: int
    inputs: dict[str, str]
    tasks: list[dict[str, Any]]
    entries: list[FileEntry]
    counts: Counter[str]
    dropped: Counter[str]


def run(spec: TokenizeSpecification, run: Run, progress: Progress) -> Manifest:
    """Tokenize all documents that no equal specification has published, from inputs that are still the same.

    Raises SpecificationError, DocumentsUnusable and StorageError.
    """
    directories = _plan(spec)
    published: dict[str, Manifest] = {}
    waiting: list[_Directory] = []
    for directory in directories:
        if (manifest := pipeline.standing(directory.output, _alone(spec, directory.location))) is not None:
            published[directory.output] = manifest
        else:
            waiting.append(directory)
    total = sum(directory.rows for directory in waiting)
    done = 0
    progress(0, total, f"{total:,} documents of {len(waiting)} sources")
    tasks = [(directory, task) for directory in waiting for task in directory.tasks]
    arguments = {
        "text_tokenizer": spec.locate(spec.text_tokenizer),
        "image_tokenizer": spec.locate(spec.image_tokenizer),
        "device": "cuda" if spec.resources.gpus_per_worker else "cpu",
        "threads": max(1, int(spec.resources.cpus_per_worker)),
    }
    results = pipeline.in_order([task for _, task in tasks], Tokenizer, spec.resources, arguments)
    for (directory, task), result in zip(tasks, results, strict=True):
        directory.entries += [FileEntry.model_validate(entry) for entry in result["files"]]
        directory.counts.update(result["counts"])
        directory.dropped.update(result["dropped"])
        done += result["counts"].get("documents", 0)
        progress(done, total, last_part(directory.location))
        if task is directory.tasks[-1]:
            published[directory.output] = _publish(spec, directory)
    manifest = pipeline.together(TOKENS, spec, {last_part(d.location): published[d.output] for d in directories})
    manifest.write(spec.locate(spec.output))
    run.log_metrics(_metrics(manifest))
    return manifest


def _alone(spec: TokenizeSpecification, location: str) -> TokenizeSpecification:
    """The specification that makes this directory only: what its manifest records."""
    return spec.model_copy(update={"documents": [location]})


def _plan(spec: TokenizeSpecification) -> list[_Directory]:
    """What to do, with everything checked that needs no cluster. Raises SpecificationError and StorageError."""
    image_length = _image_length(spec)
    directories = []
    for location in spec.documents:
        documents = spec.locate(location)
        manifest = shards.curated(documents)
        if image_length > spec.context + 1 and _images(manifest):
            raise SpecificationError(
                f"context: {spec.context} is too short for the {image_length} tokens of an image, and {documents} has "
                f"{_images(manifest):,} images; set at least {image_length - 1}"
            )
        inputs = fingerprints([documents, spec.locate(spec.text_tokenizer), spec.locate(spec.image_tokenizer)])
        alone = _alone(spec, location)
        mark = pipeline.fingerprint(alone, inputs)
        output = storage.join(spec.locate(spec.output), last_part(location))
        tasks = [
            {
                "specification": alone.model_dump(mode="json"),
                "shards": window,
                "seed": _seed(spec.seed, last_part(location), number),
                "output": output,
                "stem": pipeline.stem("tokens", mark, number),
            }
            for number, window in enumerate(windows(shards.shard_uris(documents, manifest), manifest.rows, spec.seed))
        ]
        directories.append(
            _Directory(location, documents, output, manifest.rows, inputs, tasks, [], Counter(), Counter())
        )
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


def _images(manifest: Manifest) -> int:
    reports = manifest.report.get("sources", {"": manifest.report})
    return sum(report.get("images", 0) for report in reports.values())


def windows(uris: Sequence[str], documents: int, seed: int) -> list[list[str]]:
    """Shards dealt to windows of about WINDOW documents, in an order that the seed decides."""
    order = np.random.default_rng(seed).permutation(len(uris))
    count = min(len(uris), max(1, documents // WINDOW))
    return [[uris[i] for i in order[number::count]] for number in range(count)]


def _seed(seed: int, name: str, window: int) -> list[int]:
    return [seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]), window]


def _publish(spec: TokenizeSpecification, directory: _Directory) -> Manifest:
    if not directory.entries:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(directory.dropped.items()))
        raise DocumentsUnusable(
            f"{directory.documents}: none of its documents fits a context of {spec.context}: {reasons or 'it is empty'}"
        )
    rows = sum(entry.rows for entry in directory.entries)
    counts = directory.counts
    manifest = Manifest(
        kind=TOKENS,
        files=directory.entries,
        specification=_alone(spec, directory.location).model_dump(mode="json"),
        inputs=directory.inputs,
    )
    manifest.report = {
        "documents": counts["documents"],
        "split": counts["split"],
        "dropped": dict(directory.dropped),
        "longer_than_context": counts["split"] + sum(directory.dropped.values()),
        "sequences": counts["sequences"],
        "rows": rows,
        "row_groups": manifest.row_groups,
        "tokens": manifest.tokens,
        "trained": counts["trained"],
        "padding_share": counts["padding"] / (rows * (spec.context + 1)),
    }
    pipeline.publish(directory.output, manifest)
    return manifest


def _metrics(manifest: Manifest) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, report in manifest.report["sources"].items():
        metrics |= {
            f"{name}/{n}": float(report[n]) for n in ("documents", "rows", "padding_share", "longer_than_context")
        }
        metrics |= {f"{name}/{modality}_tokens": float(count) for modality, count in report["tokens"].items()}
    return metrics
