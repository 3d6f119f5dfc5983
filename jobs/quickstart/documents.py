"""The quickstart's raw documents: real data that every machine has, written the way such data arrives.

Digit scans (scikit-learn) as image-caption pairs in WebDataset tars, Python's reference and standard library as JSON
lines, interleaved pages as Parquet, conversations as JSON lines. Scans are split into train and held-out first;
only training scans are turned, slanted, stretched and shifted a little for further pictures (`Scan.augmented`).
"""

from __future__ import annotations

import inspect
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calumma.jobs.quickstart import conversations as talk
from calumma.jobs.quickstart import digits
from calumma.jobs.quickstart.digits import WORDS, Scan
from calumma.platform.cluster.progress import Progress, no_progress
from calumma.platform.specification import JobSpecification, Section

if TYPE_CHECKING:
    from calumma.platform.storage.manifest import FileEntry, Manifest

CAPTIONS = ("{digit}", "{a_digit}", "the digit {digit}", "a handwritten {digit}")
OPENINGS = ("Counting from {first} to {last}.", "From {first} to {last}:")
DIGITS = {"license": digits.LICENSE, "url": digits.URL}
PYTHON = {"license": "PSF-2.0", "url": "https://docs.python.org/3/"}
# Modules of plain, commented code, in this order until enough characters are found.
# fmt: off
MODULES = (
    "bisect", "heapq", "textwrap", "string", "statistics", "fractions", "colorsys", "csv", "calendar", "difflib",
    "shlex", "random", "copy", "glob", "queue", "dataclasses", "contextlib", "functools", "collections",
    "configparser", "argparse", "pprint", "reprlib", "sched", "types",
)
# fmt: on


RawFile = tuple[str, bytes, int]  # name, content, documents in it
FileMakers = dict[str, Callable[[], Iterable[RawFile]]]  # by source: each has its folder


class Sizes(Section):
    """How much is written. None: all there is."""

    scans: int | None = None
    copies: int = 4  # moved pictures of each training scan, beside the scan itself
    pages: int = 800
    recognition: int = 16000
    drawing: int = 2000
    counting: int = 1500
    text_characters: int = 300_000
    code_characters: int = 300_000
    code_questions: int = 60
    asked_drawings: int = 10  # evaluation prompts a digit


FULL = Sizes()
FAST = Sizes(
    scans=120,
    copies=1,
    pages=40,
    recognition=60,
    drawing=60,
    counting=60,
    text_characters=30_000,
    code_characters=30_000,
    code_questions=10,
    asked_drawings=2,
)


class DocumentsSpecification(JobSpecification):
    """Compared with the one in the manifest, like any job's, to see whether the step is finished."""

    job: Literal["documents"] = "documents"
    output: str = "documents"
    sizes: Sizes = FULL
    samples_per_tar: int = 500


def write_documents(storage_uri: str, fast: bool = False, progress: Progress = no_progress, seed: int = 0) -> Manifest:
    """Write everything below `storage_uri`/documents. Raises StorageError."""
    sizes = FAST if fast else FULL
    return write(DocumentsSpecification(storage=storage_uri, sizes=sizes, seed=seed), progress)


def write(spec: DocumentsSpecification, progress: Progress = no_progress) -> Manifest:
    """Write the documents of a specification, a manifest for each source, and the whole's last. Raises StorageError."""
    return write_sources(spec, _file_makers(spec), {"scans": _scan_report(spec)}, progress)


def write_sources(
    spec: JobSpecification, file_makers: FileMakers, report: dict[str, Any], progress: Progress = no_progress
) -> Manifest:
    """Write every source's files below the specification's output; `report` goes into its manifest."""
    from calumma.platform import storage
    from calumma.platform.storage.manifest import MANIFEST, FileEntry, Manifest

    root = spec.output_uri
    storage.delete(storage.join(root, MANIFEST))
    specification = spec.model_dump(mode="json")
    everything: list[FileEntry] = []
    documents: dict[str, int] = {}
    for done, (name, make_files) in enumerate(file_makers.items()):
        progress(done, len(file_makers), name)
        folder = storage.join(root, name)
        entries: list[FileEntry] = []
        for file, data, rows in make_files():
            storage.write_bytes(storage.join(folder, file), data)
            entries.append(FileEntry.from_bytes(file, data, rows=rows))
        _delete_stale_files(folder, name, keep={entry.path for entry in entries})
        # No sizes of other sources: what is made of an unchanged source stands.
        source = Manifest(kind="documents", files=entries, specification={"job": spec.job, "source": name})
        source.write(folder)
        documents[name] = source.rows
        everything += [entry.model_copy(update={"path": f"{name}/{entry.path}"}) for entry in entries]
    report = {"documents": documents, **report}
    manifest = Manifest(kind="documents", files=everything, specification=specification, report=report)
    manifest.write(root)
    progress(len(file_makers), len(file_makers), f"{sum(documents.values()):,} documents")
    return manifest


def _delete_stale_files(folder: str, name: str, keep: set[str]) -> None:
    """Delete files that another specification, or a call that was interrupted, has left; none but our own."""
    from calumma.platform import storage

    ours = re.compile(rf"{name}(-\d{{5}})?\.(tar|jsonl|parquet)")
    for uri in storage.list_files(folder):
        file = storage.relative(uri, folder)
        if ours.fullmatch(file) and file not in keep:
            storage.delete(uri)


def scans(spec: DocumentsSpecification) -> tuple[list[Scan], list[Scan]]:
    """(training, held-out) scans of a specification."""
    everything = digits.read_scans()
    if spec.sizes.scans is not None:
        everything = everything[: spec.sizes.scans]
    return digits.split(everything, spec.seed)


def _scan_report(spec: DocumentsSpecification) -> dict[str, Any]:
    train, held_out = scans(spec)
    return {
        "train": len(train),
        "held_out": len(held_out),
        "split": "by scan, stratified by digit, before anything else",
        "augmentation": f"{spec.sizes.copies} pictures of each training scan, turned by up to 12 degrees, slanted by "
        "up to a sixth, 0.88 to 1.14 times as wide and high, shifted by up to 2 of 32 pixels, half of that in pairs "
        "with captions; none of a held-out scan",
    }


def _file_makers(spec: DocumentsSpecification) -> FileMakers:
    """Source name -> what makes its files. Each has its own random numbers: one source's size changes no other."""
    train, held_out = scans(spec)
    sizes = spec.sizes
    sections = _text_sections(sizes.text_characters)
    sources = _code_sources(sizes.code_characters)

    def random(stream: int) -> np.random.Generator:
        return np.random.default_rng([spec.seed, stream])

    def exact(name: str, chosen: list[Scan]) -> Iterator[RawFile]:
        return tars(name, ((s.name, s.png(), s.word) for s in chosen), spec.samples_per_tar)

    def lines(name: str, rows: list[dict[str, Any]]) -> list[RawFile]:
        return [(f"{name}.jsonl", json_lines(rows), len(rows))]

    def chat(name: str, make: Callable[[], list[talk.Conversation]]) -> Callable[[], list[RawFile]]:
        return lambda: lines(name, [c.row() for c in make()])

    return {
        "scans_train": lambda: exact("scans_train", train),
        "scans_held_out": lambda: exact("scans_held_out", held_out),
        "pairs": lambda: tars("pairs", _pairs(train, sizes.copies, random(1)), spec.samples_per_tar),
        "text": lambda: lines("text", [{"text": t, **PYTHON} for i, t in enumerate(sections) if i % 20]),
        "text_held_out": lambda: lines("text_held_out", [{"text": t, **PYTHON} for t in sections[::20]]),
        "code": lambda: lines("code", [{"text": t, **PYTHON} for t in sources]),
        "pages": lambda: _pages(train, sizes.pages, random(2)),
        "chat_recognition": chat("chat_recognition", lambda: _recognition_chats(train, sizes.recognition, random(3))),
        "chat_drawing": chat("chat_drawing", lambda: _drawing_chats(train, sizes.drawing, random(4))),
        "chat_counting": chat("chat_counting", lambda: _counting_chats(train, sizes.counting, random(5))),
        "chat_text": chat("chat_text", lambda: _python_chats(sources, sizes.code_questions)),
        "ask_recognition": chat("ask_recognition", lambda: [talk.recognition_chat(s) for s in held_out]),
        "ask_drawing": chat("ask_drawing", lambda: _drawing_prompts(held_out, sizes.asked_drawings)),
        "ask_counting": chat("ask_counting", lambda: _counting_prompts(held_out)),
    }


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pairs(train: list[Scan], copies: int, random: np.random.Generator) -> Iterator[tuple[str, bytes, str]]:
    """(key, PNG, caption) of every training scan and its moved copies, shuffled."""
    jobs = [(scan, copy) for scan in train for copy in range(copies + 1)]
    for index in random.permutation(len(jobs)):
        scan, copy = jobs[index]
        shown = scan if copy == 0 else scan.augmented(random, 0.5)
        caption = CAPTIONS[int(random.integers(len(CAPTIONS)))]
        text = caption.format(digit=scan.word, a_digit=talk.with_article(scan.word))
        yield f"{scan.name}-{copy}", shown.png(), text


def tars(
    name: str, samples: Iterable[tuple[str, bytes, str]], samples_per_tar: int, about: dict[str, str] = DIGITS
) -> Iterator[RawFile]:
    """WebDataset shards: KEY.png, KEY.txt and KEY.json (`about`) of each sample; equal input gives equal bytes."""
    metadata = json.dumps(about).encode()
    batch: list[tuple[str, bytes, str]] = []
    shard = 0
    for sample in samples:
        batch.append(sample)
        if len(batch) == samples_per_tar:
            yield f"{name}-{shard:05d}.tar", _tar(batch, metadata), len(batch)
            shard, batch = shard + 1, []
    if batch:
        yield f"{name}-{shard:05d}.tar", _tar(batch, metadata), len(batch)


def _tar(samples: list[tuple[str, bytes, str]], metadata: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, png, caption in samples:
            for extension, data in (("png", png), ("txt", caption.encode()), ("json", metadata)):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class _ScanSampler:
    """Draws training scans of a wanted digit."""

    def __init__(self, scans: list[Scan], random: np.random.Generator) -> None:
        self._random = random
        self._scans = {d: [s for s in scans if s.digit == d] for d in range(len(WORDS))}

    def draw(self, digit: int) -> Scan:
        own = self._scans[digit]
        return own[int(self._random.integers(len(own)))]


def _pages(train: list[Scan], count: int, random: np.random.Generator) -> list[RawFile]:
    """Parquet of `texts` and `images`, parallel lists with exactly one of the two set at each place."""
    scan_of = _ScanSampler(train, random)
    spans = talk.counting_ranges()
    rows: dict[str, list[Any]] = {"texts": [], "images": [], "captions": [], "license": [], "url": []}
    for _ in range(count):
        first, last = spans[int(random.integers(len(spans)))]
        opening = OPENINGS[int(random.integers(len(OPENINGS)))].format(first=WORDS[first], last=WORDS[last])
        texts: list[str | None] = []
        images: list[bytes | None] = []
        captions: list[str | None] = []
        for digit in range(first, last + 1):
            lead = f"{opening} " if digit == first else " "
            texts += [f"{lead}{WORDS[digit]} ", None]
            images += [None, scan_of.draw(digit).png()]
            captions += [None, WORDS[digit]]
        for column, value in (("texts", texts), ("images", images), ("captions", captions)):
            rows[column].append(value)
        rows["license"].append(digits.LICENSE)
        rows["url"].append(digits.URL)
    return [("pages-00000.parquet", page_table(rows), count)]


def page_table(rows: dict[str, list[Any]]) -> bytes:
    """Parquet of the columns `texts`, `images`, `captions` (lists) and `license`, `url`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    strings = pa.list_(pa.string())
    schema = pa.schema(
        [("texts", strings), ("images", pa.list_(pa.binary())), ("captions", strings)]
        + [(name, pa.string()) for name in ("license", "url")]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


# -- text and code ----------------------------------------------------------------------------------------------------


def _text_sections(characters: int) -> list[str]:
    """Sections of Python's reference, each up to about 1,500 characters, cut between paragraphs."""
    from pydoc_data.topics import topics

    sections: list[str] = []
    for page in topics.values():
        current = ""
        for paragraph in re.split(r"\n\s*\n", page.strip()):
            if current and len(current) + len(paragraph) > 1500:
                sections.append(current)
                current = ""
            current = f"{current}\n\n{paragraph}" if current else paragraph
        sections.append(current)
    return _first_characters(sections, characters)


def _code_sources(characters: int) -> list[str]:
    """Top-level pieces of standard library modules, each up to about 1,500 characters."""
    import importlib

    pieces: list[str] = []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        current = ""
        for block in re.split(r"\n{2,}(?=\S)", source):
            if current and len(current) + len(block) > 1500:
                pieces.append(current)
                current = ""
            current = f"{current}\n\n{block}" if current else block
        pieces.append(current)
    return _first_characters(pieces, characters)


def _first_characters(pieces: list[str], characters: int) -> list[str]:
    total = 0
    kept = []
    for piece in pieces:
        if total >= characters:
            break
        kept.append(piece)
        total += len(piece)
    return kept


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# -- conversations ----------------------------------------------------------------------------------------------------


def _recognition_chats(train: list[Scan], count: int, random: np.random.Generator) -> list[talk.Conversation]:
    """Every training scan is asked about once before any is asked about again, moved."""
    order = [int(i) for _ in range(count // len(train) + 1) for i in random.permutation(len(train))][:count]
    wordings = talk.wordings(random, talk.RECOGNITION, count)
    return [
        talk.recognition_chat(train[index] if place < len(train) else train[index].augmented(random), wording)
        for place, (index, wording) in enumerate(zip(order, wordings, strict=True))
    ]


def _drawing_chats(train: list[Scan], count: int, random: np.random.Generator) -> list[talk.Conversation]:
    order = [int(i) for _ in range(count // len(train) + 1) for i in random.permutation(len(train))][:count]
    wordings = talk.wordings(random, talk.DRAWING, count)
    return [talk.drawing_chat(train[index], wording) for index, wording in zip(order, wordings, strict=True)]


def _counting_chats(train: list[Scan], count: int, random: np.random.Generator) -> list[talk.Conversation]:
    scan_of = _ScanSampler(train, random)
    spans = talk.counting_ranges()
    wordings = talk.wordings(random, talk.COUNTING, count)
    chats = []
    for index, wording in enumerate(wordings):
        first, last = spans[index % len(spans)]
        chats.append(talk.counting_chat([scan_of.draw(d) for d in range(first, last + 1)], wording))
    return [chats[i] for i in random.permutation(count)]


def _python_chats(sources: list[str], code_questions: int) -> list[talk.Conversation]:
    from pydoc_data.topics import topics

    return talk.reference_chats(topics) + talk.code_chats(sources, code_questions)


def _drawing_prompts(held_out: list[Scan], each: int) -> list[talk.Conversation]:
    """Each digit several times; the answer is a held-out scan to look at beside the drawn picture."""
    prompts = []
    for digit in range(len(WORDS)):
        own = [s for s in held_out if s.digit == digit]
        prompts += [talk.drawing_chat(own[i % len(own)]) for i in range(each)]
    return prompts


def _counting_prompts(held_out: list[Scan]) -> list[talk.Conversation]:
    """Every range once, shown with held-out scans."""
    scan_of = _ScanSampler(held_out, np.random.default_rng(0))
    return [talk.counting_chat([scan_of.draw(d) for d in range(a, b + 1)]) for a, b in talk.counting_ranges()]
