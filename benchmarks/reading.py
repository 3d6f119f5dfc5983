"""Reading raw files: CPU time a record, container by container, the least of --repeats.

    python benchmarks/reading.py                   # a minute
    python benchmarks/reading.py --against TREE    # and beside it another checkout's, in turns, each in its own process

Texts are cut from Python's own reference to log-normal lengths, with a URL, a license and metadata. Of another
checkout only what it has in common is needed: `read_file(format, source, uri)`; it runs with this one's packages.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOBS = (
    ("text", "texts-1800.jsonl"),
    ("text", "texts-1800.json"),
    ("text", "texts-1800.jsonl.gz"),
    ("text", "texts-1800.parquet"),
    ("text", "texts-300.jsonl"),
    ("text", "texts-300.json"),
    ("text", "texts-300.parquet"),
    ("conversations", "conversations.jsonl"),
    ("conversations", "conversations.json"),
    ("interleaved", "interleaved.jsonl"),
    ("webdataset", "pairs.tar"),
    ("pages", "pages"),
)


def records(count: int, characters: int) -> Iterator[dict[str, Any]]:
    text = "\n\n".join(pydoc_data.topics.topics.values())
    chance = random.Random(0)
    for number in range(count):
        length = max(20, int(chance.lognormvariate(0, 0.5) * characters))
        begin = chance.randrange(len(text) - length)
        about = {"url": f"https://example.org/{number}", "license": "CC0", "metadata": {"id": number, "lang": "en"}}
        yield {"text": text[begin : begin + length], **about}


def make(folder: Path, scale: float) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    for characters, count in ((1800, int(4000 * scale)), (300, int(12_000 * scale))):
        rows = list(records(count, characters))
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        base = folder / f"texts-{characters}"
        base.with_suffix(".jsonl").write_bytes(lines)
        base.with_suffix(".json").write_text(json.dumps(rows))
        base.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines))
        plain = [{key: value for key, value in row.items() if key != "metadata"} for row in rows]
        pq.write_table(pa.Table.from_pylist(plain), base.with_suffix(".parquet"))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 200, 30)).save(buffer, "JPEG")
    picture = buffer.getvalue()
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    texts = [row["text"] for row in records(int(6000 * scale), 300)]
    conversations = [
        {"id": str(number), "conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": text[::-1]},
            {"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."},
        ]}
        for number, text in enumerate(texts)
    ]  # fmt: skip
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations))
    (folder / "conversations.json").write_text(json.dumps(conversations, indent=2))
    pages = [{"texts": [text, None, text], "images": [None, url, None]} for text in texts[: len(texts) // 2]]
    (folder / "interleaved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pages))
    with tarfile.open(folder / "pairs.tar", "w") as archive:
        for number in range(int(3000 * scale)):
            about = json.dumps({"url": f"https://example.org/{number}", "width": 64, "status": "success"})
            for suffix, data in (("jpg", picture), ("txt", b"caption %d" % number), ("json", about.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    (folder / "pages").mkdir()
    for number, text in enumerate(row["text"] for row in records(int(600 * scale), 3000)):
        paragraphs = "</p><p>".join(text.replace("<", "&lt;").split("\n\n"))
        (folder / f"pages/{number:04d}.html").write_text(f"<html><body><h1>T</h1><p>{paragraphs}</p></body></html>")
        (folder / f"pages/{number:04d}.md").write_text(f"# Title\n\n{text}")


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Microseconds of CPU a record, by the name of the file."""
    from calumma.platform.sources.reading import read_file

    found = {}
    for form, name in JOBS:
        path = folder / name
        uris = sorted(map(str, path.iterdir())) if path.is_dir() else [str(path)]
        times = []
        for _ in range(repeats):
            began = time.process_time()
            count = sum(1 for uri in uris for _ in read_file(form, "source", uri))
            times.append((time.process_time() - began) / count)
        found[name] = 1e6 * min(times)
    return found


def measure_apart(folder: Path, repeats: int, tree: Path) -> dict[str, float]:
    """`measure` in a process that imports the code of a checkout."""
    with tempfile.TemporaryDirectory() as links:
        package = Path(links, "calumma")
        package.mkdir()
        for room in ("jobs", "model", "platform", "serve"):
            (package / room).symlink_to(tree / room)
        command = [sys.executable, __file__, "--measure", str(folder), "--repeats", str(repeats)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": links}, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a little of everything, once")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.repeats)))
        return
    repeats, scale = (1, 0.02) if given.quick else (given.repeats, 1.0)
    trees = [ROOT, *([given.against.resolve()] if given.against else [])]
    with tempfile.TemporaryDirectory(prefix="calumma-benchmark-") as name:
        folder = Path(name)
        make(folder, scale)
        turns = [[measure_apart(folder, 1, tree) for tree in trees] for _ in range(repeats)]
    print("| file | µs a record |" + (" of the other | ratio |" if given.against else ""))
    print("|---|---|" + ("---|---|" if given.against else ""))
    for _, file in JOBS:
        ours, *others = (min(turn[n][file] for turn in turns) for n in range(len(trees)))
        print(f"| {file} | {ours:.1f} |" + "".join(f" {theirs:.1f} | {ours / theirs:.2f} |" for theirs in others))


if __name__ == "__main__":
    main()
