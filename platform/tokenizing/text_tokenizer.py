"""Training of the BPE text tokenizer on curated documents (paper section 2.2); one process, no cluster."""

from __future__ import annotations

import itertools
import os
import posixpath
import tempfile
from collections.abc import Iterable, Iterator

from calumma.model.document import Document, Text
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer as train
from calumma.platform import storage
from calumma.platform.cluster.progress import Progress
from calumma.platform.shards.documents import curated_manifest, read_documents
from calumma.platform.specification import JobSpecification, SpecificationError, with_absolute_storage
from calumma.platform.storage.manifest import MANIFEST, Manifest, file_entries
from calumma.platform.tokenizing.specification import TextTokenizerSpecification
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run

KIND = "text_tokenizer"
_MEASURED_CHARACTERS = 1_000_000  # characters on which bytes a token are measured


def train_text_tokenizer(spec: TextTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    """Train and publish the text tokenizer. Raises SpecificationError when the documents do not support it."""
    original, spec = spec, with_absolute_storage(spec)
    uris = [spec.locate(uri) for uri in spec.documents]
    for uri in uris:
        curated_manifest(uri)
    output = spec.locate(spec.output)
    check_output(spec, output, uris, KIND)
    progress(0, 2, "reading documents")
    collected = list(first_characters(texts([read_documents(uri) for uri in uris]), spec.max_characters))
    if not collected:
        raise SpecificationError(f"documents: there is no text in {', '.join(uris)}")
    progress(1, 2, "training")
    with tempfile.TemporaryDirectory(prefix="calumma-text-tokenizer-") as folder:
        try:
            vocabulary = train(collected, folder, spec.vocabulary_size, spec.image_codes, os.cpu_count() or 1)
        except ValueError as error:
            raise SpecificationError(f"vocabulary_size: {error}") from error
        report = {
            "vocabulary_size": vocabulary.size,
            "image_codes": len(vocabulary.image_codes),
            "documents_text": len(collected),
            "characters": sum(map(len, collected)),
            "bytes_per_token": bytes_per_token(TextTokenizer.read(folder), collected),
        }
        files = file_entries(folder)
        delete_tokenizer(output, KIND)
        storage.upload(folder, output)
    run.log_metrics({key: float(value) for key, value in report.items()})
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=original.model_dump(mode="json"),
        report={**report, "run": run.id},
        inputs=fingerprints(uris),
    )
    manifest.write(output)
    progress(2, 2)
    return manifest


def check_output(spec: JobSpecification, output: str, inputs: Iterable[str], kind: str) -> None:
    """Raises SpecificationError when a tokenizer must not be written to this folder: it holds something else."""
    place, root = _path_parts(output), _path_parts(spec.storage)
    if place == root[: len(place)]:
        raise SpecificationError(
            f"output: {output} is the storage itself or holds it; name a folder below {spec.storage}"
        )
    for uri in inputs:
        read_from = _path_parts(uri)
        shorter = min(len(place), len(read_from))
        if place[:shorter] == read_from[:shorter]:
            raise SpecificationError(f"output: {output} overlaps with {uri}, which is read; name another folder")
    manifest = Manifest.find(output)
    if manifest is not None and manifest.kind != kind:
        raise SpecificationError(f"output: {output} holds {manifest.kind!r}, and no {kind!r}; name another folder")


def _path_parts(uri: str) -> tuple[str, ...]:
    if storage.is_remote(uri):
        return ("s3:", *posixpath.normpath(uri.removeprefix("s3://")).split("/"))
    return storage.local_path(uri).resolve().parts


def delete_tokenizer(output: str, kind: str) -> None:
    """Delete the tokenizer that a new one is about to replace, and no file that its manifest does not name."""
    manifest = Manifest.find(output)
    if manifest is not None and manifest.kind == kind:
        for path in (MANIFEST, *(entry.path for entry in manifest.files)):
            storage.delete(storage.join(output, path))


def texts(sources: Iterable[Iterable[Document]]) -> Iterator[str]:
    """Text segments of several sources in turn, a document of each, so that a limit leaves none of them out."""
    for documents in itertools.zip_longest(*sources):
        for document in documents:
            for segment in document.segments if document is not None else ():
                if isinstance(segment, Text) and segment.text:
                    yield segment.text


def first_characters(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Pieces until so many characters are reached; the last is cut."""
    for piece in pieces:
        if characters <= 0:
            return
        yield piece[:characters]
        characters -= len(piece)


def bytes_per_token(tokenizer: TextTokenizer, pieces: Iterable[str]) -> float:
    """UTF-8 bytes that a token stands for, on average over the first million characters."""
    size, tokens = 0, 0
    for piece in first_characters(pieces, _MEASURED_CHARACTERS):
        size += len(piece.encode())
        tokens += len(tokenizer.encode(piece))
    return size / max(tokens, 1)
