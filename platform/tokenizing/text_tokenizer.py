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
from calumma.platform.shards.documents import curated, read_documents
from calumma.platform.specification import JobSpecification, SpecificationError, absolute
from calumma.platform.storage.manifest import MANIFEST, Manifest, entries
from calumma.platform.tokenizing.specification import TextTokenizerSpecification
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run

KIND = "text_tokenizer"
_MEASURED = 1_000_000  # characters on which bytes a token are measured


def train_text_tokenizer(spec: TextTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    """Train and publish the text tokenizer. Raises SpecificationError when the documents do not support it."""
    given, spec = spec, absolute(spec)
    uris = [spec.locate(uri) for uri in spec.documents]
    for uri in uris:
        curated(uri)
    output = spec.locate(spec.output)
    check_output(spec, output, uris, KIND)
    progress(0, 2, "reading documents")
    collected = list(up_to(texts([read_documents(uri) for uri in uris]), spec.max_characters))
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
        files = entries(folder)
        clear(output, KIND)
        storage.upload(folder, output)
    run.log_metrics({key: float(value) for key, value in report.items()})
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=given.model_dump(mode="json"),
        report={**report, "run": run.id},
        inputs=fingerprints(uris),
    )
    manifest.write(output)
    progress(2, 2)
    return manifest


def check_output(spec: JobSpecification, output: str, inputs: Iterable[str], kind: str) -> None:
    """Raises SpecificationError when a tokenizer must not be written to this folder: it holds something else."""
    place, root = _parts(output), _parts(spec.storage)
    if place == root[: len(place)]:
        raise SpecificationError(
            f"output: {output} is the storage itself or holds it; name a folder below {spec.storage}"
        )
    for uri in inputs:
        read_from = _parts(uri)
        shorter = min(len(place), len(read_from))
        if place[:shorter] == read_from[:shorter]:
            raise SpecificationError(f"output: {output} overlaps with {uri}, which is read; name another folder")
    manifest = Manifest.find(output)
    if manifest is not None and manifest.kind != kind:
        raise SpecificationError(f"output: {output} holds {manifest.kind!r}, and no {kind!r}; name another folder")


def _parts(uri: str) -> tuple[str, ...]:
    if storage.is_remote(uri):
        return ("s3:", *posixpath.normpath(uri.removeprefix("s3://")).split("/"))
    return storage.local_path(uri).resolve().parts


def clear(output: str, kind: str) -> None:
    """Take away the tokenizer that a new one is about to replace, and no file that its manifest does not name."""
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


def up_to(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Pieces until so many characters are reached; the last is cut."""
    for piece in pieces:
        if characters <= 0:
            return
        yield piece[:characters]
        characters -= len(piece)


def bytes_per_token(tokenizer: TextTokenizer, pieces: Iterable[str]) -> float:
    """UTF-8 bytes that a token stands for, on average over the first million characters."""
    size, tokens = 0, 0
    for piece in up_to(pieces, _MEASURED):
        size += len(piece.encode())
        tokens += len(tokenizer.encode(piece))
    return size / max(tokens, 1)
