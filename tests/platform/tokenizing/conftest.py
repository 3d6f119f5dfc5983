"""Curated documents and tiny tokenizers, the job that tokenizes them, and what it wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Text
from calumma.model.encoding import DocumentEncoder
from calumma.model.images import preprocess
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import validate
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing import actor, tokenize
from calumma.platform.tokenizing.specification import TokenizeSpecification

CODES = 8  # entries of the tests' codebook; an image is 4x4 of them
IMAGE_LENGTH = 16 + 2
CONTEXT = 63


class Recorder:
    """What a job logs."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int) -> Document:
    image, caption = Image(png(number), f"number {number}"), Text(f"number {number}")
    return Document((image, caption) if number % 2 else (caption, image), source="pairs")


def publish(uri: str, documents: list[Document], a_shard: int = 1000) -> None:
    """A curated directory of these documents."""
    entries = []
    for number in range(0, len(documents), a_shard):
        data = document_shards.to_parquet(part := documents[number : number + a_shard])
        path = f"documents-{number:04d}.parquet"
        storage.write_bytes(storage.join(uri, path), data)
        entries.append(FileEntry.from_bytes(path, data, rows=len(part)))
    images = sum(len(document.images) for document in documents)
    Manifest(kind=document_shards.CURATED, files=entries, report={"images": images}).write(uri)


def curated(root: Path | str) -> None:
    """Two directories: 60 pairs in four shards, and 30 texts of growing length in two."""
    publish(f"{root}/curated/pairs", [pair(n) for n in range(60)], 15)
    texts = [Document((Text(f"text {n}: " + "more words " * n),)) for n in range(30)]
    publish(f"{root}/curated/text", texts, 15)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text").mkdir()
    (folder / "image").mkdir()
    texts = [f"number {n} more words of text {n}" for n in range(200)]
    train_text_tokenizer(texts, folder / "text", 300, CODES)
    small = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image, random = ImageTokenizer(small), torch.Generator().manual_seed(0)
    shades = torch.stack([preprocess(Image(png(n)).open(), 8, "crop") for n in range(0, 300, 3)])
    image.restart_dead_codes(torch.zeros(CODES, dtype=torch.bool), shades, random)  # which tell pictures apart
    image.save(folder / "image")
    return folder


@pytest.fixture
def encoder(tokenizers: Path) -> DocumentEncoder:
    text = tokenizers / "text"
    return DocumentEncoder(
        Vocabulary.read(text), TextTokenizer.read(text), ImageTokenizer.read(tokenizers / "image", "cpu")
    )


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the directories that windows were made of, one for each window."""
    names: list[str] = []
    work = actor.TokenizingActor.__call__

    def noted(self: actor.TokenizingActor, task: dict[str, Any]) -> dict[str, Any]:
        names.append(Path(task["output"]).name)
        return work(self, task)

    monkeypatch.setattr(actor.TokenizingActor, "__call__", noted)
    return names


def tokenization(root: Path | str, tokenizers: Path, **fields: Any) -> TokenizeSpecification:
    values: dict[str, Any] = {
        "job": "tokenize",
        "storage": str(root),
        "documents": ["curated/pairs", "curated/text"],
        "text_tokenizer": str(tokenizers / "text"),
        "image_tokenizer": str(tokenizers / "image"),
        "context": CONTEXT,
        "micro_batch": 4,
        "micro_batches_per_shard": 2,
        "resources": {"workers": 0},
        **fields,
    }
    return validate(TokenizeSpecification, values, "the test")


def run(spec: TokenizeSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return tokenize.run(spec, recorder, no_progress), recorder  # type: ignore[arg-type]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [row for entry in Manifest.read(uri).files for row in pq.read_table(f"{uri}/{entry.path}").to_pylist()]


def documents_in(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of every document of some rows."""
    found = []
    for row in rows:
        tokens, segments = np.array(row["tokens"]), np.array(row["segments"])
        found += [tokens[segments == n].tolist() for n in range(segments.max() + 1)]
    return found
