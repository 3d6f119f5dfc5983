"""Curated documents of a small corpus, for the tests of whatever reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.storage.manifest import FileEntry, Manifest

WORDS = ("one", "two", "three", "four")


def draw(seed: int, size: int = 8) -> PILImage.Image:
    random = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 20, np.uint8)
    x, y = random.integers(0, size // 2, 2)
    pixels[y : y + size // 2, x : x + size // 2] = random.integers(100, 255, 3)
    return PILImage.fromarray(pixels)


@pytest.fixture(scope="session")
def picture() -> Callable[..., PILImage.Image]:
    """picture(seed, size=8): a bright square on a dark ground, something that can be learned."""
    return draw


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage with curated documents: `curated/pairs`, pictures with captions, and `curated/lines`, lines of text."""
    root = str(tmp_path_factory.mktemp("storage"))
    pairs = [Document((Text(WORDS[i % 4] + " "), Image(draw(i)))) for i in range(24)]
    lines = [Document((Text(f"{WORDS[i % 4]} follows {WORDS[(i + 3) % 4]}. " * 3),)) for i in range(24)]
    for name, documents in (("pairs", pairs), ("lines", lines)):
        data = document_shards.to_parquet(documents)
        storage.write_bytes(f"{root}/curated/{name}/documents.parquet", data)
        entry = FileEntry.from_bytes("documents.parquet", data, rows=len(documents))
        Manifest(kind=document_shards.CURATED, files=[entry]).write(f"{root}/curated/{name}")
    return root
