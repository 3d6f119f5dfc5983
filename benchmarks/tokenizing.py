"""Tokenizing: what a worker of the job `tokenize` does with its documents (read Parquet, encode, shuffle, pack, write
checked shards) beside its bare tokenizers, which are handed texts and pixels in memory and whose ids are thrown away.

    python benchmarks/tokenizing.py            # three minutes on one CPU core; images on CUDA where there is a device
    python benchmarks/tokenizing.py --quick    # only shows that it works

Documents are Python's own reference and sources, cut to log-normal lengths, and pictures as JPEG; the image tokenizer
is the published one with random weights, at a lower resolution on a CPU. Bare and job take turns in one process, held
to `--cores` cores. CPU time is the fairer measure where other processes use the same cores, wall time where the job
waits for a GPU or a disk.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import pydoc_data.topics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image as PILImage

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Text
from calumma.model.images import preprocess
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import SentencepieceTokenizer, TextTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.platform.shards import documents as document_shards
from calumma.platform.tokenizing.actor import TokenizingActor
from calumma.platform.tokenizing.specification import TokenizeSpecification

A_SHARD = 1000  # documents
PICTURE = (640, 480)


@dataclass(frozen=True)
class Corpus:
    name: str
    documents: list[Document]
    bare: Callable[[], int]
    """Run the bare tokenizers; how many tokens they made."""


@dataclass(frozen=True)
class Time:
    wall: float
    cpu: float


def texts(characters: int) -> str:
    """Reference text and sources of Python, which are on every machine."""
    found = list(pydoc_data.topics.topics.values())
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(found)[:characters]


def cut(text: str, characters: float) -> list[Document]:
    """Documents of log-normal length, `characters` in the median."""
    random = np.random.default_rng(0)
    documents = []
    begin = 0
    while begin < len(text):
        length = max(20, int(random.lognormal(np.log(characters), 1.0)))
        documents.append(Document((Text(text[begin : begin + length]),)))
        begin += length
    return documents


def pairs(count: int) -> list[Document]:
    """Smooth pictures with some noise, as JPEG, with captions."""
    random = np.random.default_rng(0)
    documents = []
    for number in range(count):
        coarse = PILImage.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PICTURE)
        noise = random.integers(-8, 9, (PICTURE[1], PICTURE[0], 3))
        pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=90)
        documents.append(Document((Image(buffer.getvalue()), Text(f"A picture of colours, number {number}."))))
    return documents


def corpora(text: str, images: int, batch: int, folder: Path, device: str) -> list[Corpus]:
    tokenizer = TextTokenizer.read(folder / "tokenizers/text")
    assert isinstance(tokenizer, SentencepieceTokenizer)
    image_tokenizer = ImageTokenizer.read(folder / "tokenizers/image", device)
    resolution = image_tokenizer.config.resolution

    def bare(documents: list[Document]) -> Callable[[], int]:
        given = [s.text for d in documents for s in d.segments if isinstance(s, Text)]
        pictures = [image.open() for d in documents for image in d.images]
        pixels = [preprocess(picture, resolution) for picture in pictures]

        def run() -> int:
            ids = tokenizer.processor.encode(given, num_threads=1, return_type="numpy")
            codes = [
                image_tokenizer.encode(torch.stack(pixels[n : n + batch]).to(device)).cpu()
                for n in range(0, len(pixels), batch)
            ]
            return sum(map(len, ids)) + sum(code.numel() for code in codes)

        return run

    pages, short, pictures = cut(text, 2400), cut(text, 350), pairs(images)
    mixed = [*pairs(images), *cut(text[: len(text) // 2], 2400)]
    mixed = [mixed[n] for n in np.random.default_rng(1).permutation(len(mixed))]
    named = {"pages": pages, "short texts": short, "image-text pairs": pictures, "pages and pairs": mixed}
    return [Corpus(name, documents, bare(documents)) for name, documents in named.items()]


def prepare(text: str, resolution: int, folder: Path) -> None:
    """A text tokenizer of 12,000 pieces, and an image tokenizer."""
    (folder / "tokenizers/text").mkdir(parents=True)
    config = ImageTokenizerConfig(resolution=resolution)
    train_text_tokenizer(
        text.split("\n\n"), folder / "tokenizers/text", config.codebook_size + 12_000, config.codebook_size
    )
    torch.manual_seed(0)
    ImageTokenizer(config).save(folder / "tokenizers/image")


def job(corpus: Corpus, folder: Path, batch: int, cores: int, device: str) -> Callable[[], dict[str, Any]]:
    """What one task of the job does, as the actor that holds the tokenizers does it."""
    shards = []
    for number in range(0, len(corpus.documents), A_SHARD):
        uri = folder / "curated" / corpus.name / f"{number:06d}.parquet"
        uri.parent.mkdir(parents=True, exist_ok=True)
        data = document_shards.to_parquet(corpus.documents[number : number + A_SHARD])
        uri.write_bytes(data)
        shards.append((str(uri), hashlib.sha256(data).hexdigest()))
    values = {
        "storage": str(folder),
        "documents": ["curated"],
        "image_batch": batch,
        "micro_batch": 2,  # as in jobs/recipes/chameleon-7b/tokenize.yaml
        "resources": {"workers": 0, "cpus_per_worker": cores, "gpus_per_worker": int(device == "cuda")},
    }
    worker = TokenizingActor(TokenizeSpecification.model_validate(values).model_dump(mode="json"))
    task = {
        "shards": shards,
        "seed": 0,
        "output": str(folder / "tokens"),
        "shard_prefix": "tokens",
        "receipt": f"{folder}/receipt",
    }
    return lambda: worker(task)


def timed(run: Callable[[], Any]) -> Time:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Time(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a little of everything, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--resolution", type=int, help="default: 512 on CUDA, 128 on a CPU")
    parser.add_argument("--images", type=int, help="default: 512 on CUDA, 8 on a CPU")
    parser.add_argument("--batch", type=int, help="images coded at once; default: 16 on CUDA, 4 on a CPU")
    parser.add_argument("--characters", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, help="default: 8 on CUDA, 1 on a CPU")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    resolution = given.resolution or (512 if cuda else 128)
    images = given.images or (512 if cuda else 8)
    batch, repeats = given.batch or (16 if cuda else 4), given.repeats
    cores = min(given.cores or (8 if cuda else 1), len(os.sched_getaffinity(0)))
    characters = given.characters
    if given.quick:
        resolution, images, characters, repeats = 64, 4, 400_000, 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    torch.set_num_threads(cores)
    pyarrow.set_cpu_count(cores)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = texts(characters)
        prepare(text, resolution, folder)
        print(
            f"{cores} cores, images {resolution}x{resolution} on {given.device}, batches of {batch}; "
            f"median of {repeats}; target: job/bare 0.80 or more on pages and on pairs\n"
        )
        print("| documents | | tokens | bare, tokens/s | job, tokens/s | job/bare, wall | job/bare, CPU |")
        print("|---|---|---|---|---|---|---|")
        for corpus in corpora(text, images, batch, folder, given.device):
            work = job(corpus, folder, batch, cores, given.device)
            tokens = corpus.bare()
            work()  # both are warm now
            turns = [(timed(corpus.bare), timed(work)) for _ in range(repeats)]
            wall = median(bare.wall / ours.wall for bare, ours in turns)
            cpu = median(bare.cpu / ours.cpu for bare, ours in turns)
            rates = [tokens / median(turn[n].wall for turn in turns) for n in (0, 1)]
            print(
                f"| {corpus.name} | {len(corpus.documents):,} | {tokens:,} | {rates[0]:,.0f} | {rates[1]:,.0f} | "
                f"{wall:.2f} | {cpu:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
