"""Curations with scores and duplicates: raw data, specifications, and what became of them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from calumma.platform.cluster.progress import no_progress
from calumma.platform.curation import curate
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.curation.steps import staging
from calumma.platform.shards.documents import read_documents
from calumma.platform.storage.manifest import Manifest

PLUGIN = "scorers_of_the_test"


class Recorder:
    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.artifacts: dict[str, bytes] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, image: PILImage.Image, path: str) -> None: ...

    def log_artifact(self, local_path: Path, folder: str | None = None) -> None:
        self.artifacts[local_path.name] = local_path.read_bytes()


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specifications find the scorers below."""
    monkeypatch.setitem(sys.modules, PLUGIN, sys.modules[__name__])


def red() -> Any:
    """Scores an image by its red."""
    return lambda images: [float(image.getpixel((0, 0))[0]) for image in images]


def length(unit: float = 1.0) -> Any:
    return lambda documents: [len(document.text) / unit for document in documents]


def too_few() -> Any:
    return lambda images: [1.0] * (len(images) - 1)


def nothing() -> Any:
    return lambda images: [float("nan")] * len(images)


def png(shade: int, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (side, side), (shade % 256, shade // 256, 99)).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_pairs(path: Path, pairs: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (caption, image) in enumerate(pairs):
            for name, data in ((f"{number:04d}.png", image), (f"{number:04d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def texts_of(root: Path, source: str) -> list[str]:
    return [document.text for document in read_documents(f"{root}/curated/{source}")]


def specification(root: Path | str, **fields: Any) -> CurateSpecification:
    values: dict[str, Any] = {"storage": str(root), "resources": {"workers": 0}, "documents_per_shard": 10, **fields}
    return CurateSpecification.model_validate(values)


def two_sources(root: Path | str, **fields: Any) -> CurateSpecification:
    sources = [{"name": name, "format": "jsonl", "location": f"raw/{name}"} for name in ("first", "second")]
    return specification(root, **{"sources": sources, "duplicates": {}, **fields})


def run(spec: CurateSpecification) -> tuple[Manifest, Recorder]:
    recorder = Recorder()
    return curate.run(spec, recorder, no_progress), recorder  # type: ignore[arg-type]


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Content by name, without the part of shards' names that tells where they were made."""
    files = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.parquet"))}
    return {f"{path.parent}/{path.name.partition('-')[2].partition('-')[2]}": data for path, data in files.items()}


def left_over(root: Path) -> list[Path]:
    return list((root / "curated").glob(f"{staging.FOLDER}*"))


def everything(root: Path | str, workers: Any = 0) -> CurateSpecification:
    return specification(
        root,
        resources={"workers": workers},
        sources=[
            {"name": "pairs", "format": "webdataset", "location": "raw/pairs"},
            {"name": "texts", "format": "jsonl", "location": "raw/texts"},
        ],
        images={"min_side": 6},
        captions={},
        texts={"min_characters": 10},
        decontaminate={"against": ["evaluation.txt"], "ngram": 5, "shortest": 5},
        scrub={},
        duplicates={"near": {"words": 3, "similarity": 0.7}},
        scorers={
            "colour": {
                "factory": "calumma.platform.curation.steps.scorers:colourfulness",
                "upsample": {"above": 45, "times": 1.5},
            },
            "repetition": {
                "factory": "calumma.platform.curation.steps.scorers:compressibility",
                "of": "documents",
                "sources": ["texts"],
                "maximum": 20,
                "resources": {"workers": workers},
            },
        },
    )


def raw(root: Path) -> None:
    pairs = [(f"caption of number {n}", png(7 * n, 5 if n % 9 == 8 else 8)) for n in range(40)]
    pairs[3] = ("IMG_0003.png", png(3))
    pairs[5] = ("mail me@example.org <b>", png(5))
    for part in range(4):
        write_pairs(root / f"raw/pairs/{part}.tar", pairs[part * 10 : part * 10 + 10])
    texts = [f"this is text {n // 2} of many, and here {'and there ' * 3}it ends" for n in range(40)]
    texts[7] = "as they said: to be or not to be, that is it"
    texts[8] = "token AKIAIOSFODNN7EXAMPLE <script>alert(1)</script>"
    texts[9] = "buy now " * 400
    texts[10] = "short"
    for part in range(3):
        write_lines(root / f"raw/texts/{part}.jsonl", texts[part * 14 : part * 14 + 14])
    (root / "evaluation.txt").write_text("To be, or not to be\n")
