"""The data plane, measured: `python benchmarks/data.py` prints one table with its targets (8 minutes on two cores).

The same packed sequences are streamed in batches of --rows, as int64 and bool tensors, from local disk and from S3 (a
moto server in a process of its own): by calumma through Ray Data, by MosaicML Streaming and WebDataset with PyTorch's
DataLoader in their own virtual environment (made below build/ at the first run), and read in order with plain pyarrow.
The rivals are given the better of one and two worker processes; calumma and pyarrow take turns. Of S3 there are two
tables in one: pyarrow and WebDataset ask for every part every time, as calumma does without `data.cache`; Streaming
cannot do without local copies of whole shards, and is measured beside calumma with `data.cache`, which keeps them too.
Memory over ten times the data goes to benchmarks/data_memory.png. `--quick` is a smoke test of the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from data_memory import chart, memory
from data_plan import plan_and_manifest, plans

from calumma.platform import storage
from calumma.platform.cluster import connection
from calumma.platform.shards import tokens as token_shards
from calumma.platform.shards.cache import ShardCache
from calumma.platform.shards.row_groups import RowGroupReader
from calumma.platform.shards.tokens import PackedRow
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.streaming.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ["mosaicml-streaming==0.13.0", "webdataset==1.0.2", "torch==2.13.0", "numpy==2.1.3"]
CONTEXT = 4096
GROUPS = 64  # row groups a shard
BUCKET = "calumma-benchmark"
LOCAL, REMOTE, COPIED = "local disk", "S3", "S3, copies kept"


@dataclass(frozen=True)
class Speed:
    """Of one stream, from when it was asked for: to its first batch, and tokens a second from there on."""

    first: float
    tokens: float

    @classmethod
    def of(cls, batches: Iterator[int], began: float) -> Speed:
        """`batches`: the tokens of each."""
        next(batches)
        first = time.perf_counter()
        total = sum(batches)
        return cls(first - began, total / (time.perf_counter() - first))


# -- the data --


def sequences(count: int, seed: int = 0) -> Iterator[PackedRow]:
    """Ids of a Zipfian text with runs of image codes; a few documents a row."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        tokens = random.zipf(1.2, CONTEXT + 1) % 65536
        if random.random() < 0.5:
            begin = int(random.integers(0, CONTEXT - 1026))
            tokens[begin : begin + 1024] = random.integers(4, 8196, 1024)
        segments = np.sort(random.integers(0, 5, CONTEXT + 1))
        yield PackedRow(tokens.astype(np.int32), None, segments.astype(np.int32))


def publish(uri: str, rows: list[PackedRow], micro_batch: int) -> Manifest:
    """Token shards of GROUPS row groups."""
    entries = []
    for number, begin in enumerate(range(0, len(rows), micro_batch * GROUPS)):
        part = rows[begin : begin + micro_batch * GROUPS]
        data = token_shards.to_parquet(part, micro_batch)
        storage.write_bytes(storage.join(uri, f"{number:05d}.parquet"), data)
        entries.append(_entry(f"{number:05d}.parquet", data, len(part), micro_batch))
    manifest = Manifest(kind="tokens", files=entries, specification={"context": CONTEXT})
    manifest.write(uri)
    return manifest


def _entry(path: str, data: bytes, rows: int, micro_batch: int) -> FileEntry:
    return FileEntry.from_bytes(
        path,
        data,
        rows=rows,
        row_groups=-(-rows // micro_batch),
        sequences_per_row_group=micro_batch,
        footer=token_shards.footer_digest(data),
    )


# -- calumma --


def stream(
    uri: str,
    manifest: Manifest,
    batches: int,
    first_step: int = 0,
    cache: ShardCache | None = None,
) -> Speed:
    from calumma.platform.streaming.tensors import PlanData, micro_batches

    began = time.perf_counter()
    data = PlanData(1, {uri: 1.0}, {uri: manifest}, 1, first_step + batches, cache=cache)
    (share,) = data.shards(1)
    read = micro_batches(share.iterator(first_step), 0, 1)
    return Speed.of((batch.tokens.numel() for _, group in read for batch in group), began)


def verification(uri: str, manifest: Manifest) -> float:
    """The share of checksums in the CPU time of reading row groups from the disk. (To stream without them is no
    measure: what was not checked is left to pyarrow, which takes longer.)"""
    plan, reader, shares = Plan(1, {uri: 1.0}, {uri: manifest}, 1), RowGroupReader(CONTEXT), []
    found = plan.to_micro_batches(plan.steps(0, manifest.row_groups))
    contents = [storage.read_bytes(storage.join(uri, entry.path)) for entry in manifest.files]
    for _ in range(5):
        began = time.process_time()
        for micro_batch in found:
            reader.read(micro_batch)
        read = time.process_time()
        for content in contents:
            token_shards.row_group_digest(content)
        shares.append((time.process_time() - read) / (read - began))
    return median(shares)


# -- plain pyarrow --


def pyarrow_alone(uri: str, manifest: Manifest, epochs: int) -> Speed:
    """Row groups of one shard after the other, as numpy arrays."""
    import pyarrow.parquet as pq

    began = time.perf_counter()

    def read() -> Iterator[int]:
        for _ in range(epochs):
            for entry in manifest.files:
                with _opened(storage.join(uri, entry.path)) as source:
                    file = pq.ParquetFile(source, pre_buffer=True)
                    for number in range(file.num_row_groups):
                        table = file.read_row_group(number)
                        tokens = table["tokens"].combine_chunks().flatten().to_numpy()
                        table["segments"].combine_chunks().flatten().to_numpy()
                        yield len(tokens)

    return Speed.of(read(), began)


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow.fs import S3FileSystem

    if not storage.is_remote(uri):
        with pa.memory_map(uri) as file:
            yield file
        return
    s3 = S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=os.environ["AWS_ENDPOINT_URL"],
        region="us-east-1",
    )
    with s3.open_input_file(uri.removeprefix("s3://")) as file:
        yield file


# -- the rivals --


def rivals_environment() -> Path:
    """The Python of their virtual environment, made if it is not there."""
    environment = ROOT / "build" / "data-rivals"
    python = environment / "bin" / "python"
    wanted = environment / "installed"
    if not wanted.is_file() or wanted.read_text() != " ".join(RIVALS):
        specification = importlib.util.spec_from_file_location("install", ROOT / "infra" / "install.py")
        assert specification is not None
        assert specification.loader is not None
        install = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(install)
        variables = os.environ | install.uv_variables(install.pip_settings())
        print(f"making {environment} ...", file=sys.stderr, flush=True)
        venv.create(environment, clear=True, with_pip=True)
        install.run([str(python), "-m", "pip", "install", "--quiet", f"uv=={install.UV}"], variables)
        uv = str(environment / "bin" / "uv")
        install.run([uv, "pip", "install", "--quiet", "--python", str(python), *RIVALS], variables)
        wanted.write_text(" ".join(RIVALS))
    return python


def rival(python: Path, *arguments: object) -> str:
    command = [str(python), str(ROOT / "benchmarks" / "data_rivals.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    return done.stdout


def rival_speed(python: Path, kind: str, location: str, rows: int, epochs: int) -> Speed:
    """The better of one and two workers."""
    found = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory(prefix="calumma-rival-") as local:
            said = rival(python, "read", kind, location, local, rows, epochs, workers)
            measured = json.loads(said.splitlines()[-1])
            found.append(Speed(measured["first"], measured["tokens"] / measured["seconds"]))
    return Speed(min(speed.first for speed in found), max(speed.tokens for speed in found))


# -- the run --


@contextlib.contextmanager
def s3_server() -> Iterator[None]:
    """A moto server in its own process, and the AWS variables that lead to it."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
        S3_ENDPOINT_URL=f"http://127.0.0.1:{port}",  # as Streaming calls it
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    try:
        import boto3

        for _ in range(120):
            try:
                boto3.client("s3").create_bucket(Bucket=BUCKET)
                break
            except Exception:
                time.sleep(0.5)
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="sequences a micro-batch")
    parser.add_argument("--sequences", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--shards", type=int, default=100_000, help="of the large manifest")
    parser.add_argument("--quick", action="store_true", help="next to nothing of everything")
    given = parser.parse_args()
    if given.quick:
        given.sequences, given.epochs, given.shards = 256, 2, 1000
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    python = rivals_environment()
    with tempfile.TemporaryDirectory(prefix="calumma-benchmark-") as folder, s3_server():
        lines = measure(given, python, folder)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(
        f"{machine}; {given.sequences} sequences of {CONTEXT + 1} tokens, {given.epochs} epochs, {given.rows} a batch\n"
    )
    print("| | measured | target |\n|---|---|---|")
    print("\n".join(lines))


def measure(given: argparse.Namespace, python: Path, folder: str) -> list[str]:
    rows = list(sequences(given.sequences))
    batches = given.sequences // given.rows * given.epochs
    here, there = f"{folder}/tokens", f"s3://{BUCKET}/tokens"
    manifest = publish(here, rows, given.rows)
    storage.upload(here, there)
    np.savez(f"{folder}/rows.npz", tokens=[r.tokens for r in rows], segments=[r.segments for r in rows])
    del rows
    for kind, name, settings in (("mds", "mds", []), ("mds", "mds-zstd", ["zstd"]), ("wds", "wds", [])):
        rival(python, "write", kind, f"{folder}/rows.npz", f"{folder}/{name}", *settings)
        storage.upload(f"{folder}/{name}", f"s3://{BUCKET}/{name}")
    found: dict[str, dict[str, Speed]] = {LOCAL: {}, REMOTE: {}, COPIED: {}}
    resumed: dict[int, float] = {}
    with connection.embedded(lean=True):
        stream(here, manifest, 4)  # Ray's workers are there from now on
        for place, uri, turns in ((LOCAL, here, 3), (REMOTE, there, 1)):
            ours = [(stream(uri, manifest, batches), pyarrow_alone(uri, manifest, given.epochs)) for _ in range(turns)]
            found[place]["calumma"], found[place]["pyarrow"] = sorted(ours, key=lambda pair: _over(*pair))[turns // 2]
        cache = ShardCache(f"{folder}/cache", manifest.bytes)
        found[COPIED]["calumma"] = stream(there, manifest, batches, cache=cache)
        for step in (0, 10**6):
            resumed[step] = median(stream(here, manifest, 4, first_step=step).first for _ in range(5))
        big = f"{folder}/big"
        more = copies(here, big, manifest, 10)
        curves = {
            "the data": memory(lambda: stream(here, manifest, batches)),
            "ten times the data": memory(lambda: stream(big, more, 10 * batches)),
        }
    chart(curves, ROOT / ("build" if given.quick else "benchmarks") / "data_memory.png")
    labels = {"mds": "Streaming", "mds-zstd": "Streaming, zstd", "wds": "WebDataset"}
    for base, places in ((folder, {}), (f"s3://{BUCKET}", {"mds": COPIED, "mds-zstd": COPIED, "wds": REMOTE})):
        for name, label in labels.items():
            speed = rival_speed(python, name[:3], f"{base}/{name}", given.rows, given.epochs)
            found[places.get(name, LOCAL)][label] = speed
    return [
        *speeds(found),
        *others(
            verification(here, manifest), resumed, {name: max(mb for _, mb in curve) for name, curve in curves.items()}
        ),
        *plans(given.shards, *plan_and_manifest(given.shards)),
    ]


def copies(source: str, target: str, manifest: Manifest, times: int) -> Manifest:
    """As many times the shards: the same bytes under other names."""
    files = []
    Path(target).mkdir()
    for turn in range(times):
        for entry in manifest.files:
            path = f"{turn}-{entry.path}"
            shutil.copyfile(f"{source}/{entry.path}", f"{target}/{path}")
            files.append(entry.model_copy(update={"path": path}))
    return manifest.model_copy(update={"files": files})


def _over(ours: Speed, theirs: Speed) -> float:
    return ours.tokens / theirs.tokens


def speeds(found: dict[str, dict[str, Speed]]) -> Iterator[str]:
    """Everything beside calumma in the same place."""
    for place, by_name in found.items():
        for name, speed in by_name.items():
            target = {"pyarrow": "calumma >= 0.8 of it"}.get(name, "calumma >= 2 of it" if "Streaming" in name else "")
            said = "" if name == "calumma" else f"; calumma: {_over(by_name['calumma'], speed):.2f} of it"
            yield (
                f"| {place}, {name} | {speed.tokens / 1e6:.1f} M tokens/s, first batch {speed.first:.2f} s{said} | "
                f"{target} |"
            )


def others(cost: float, resumed: dict[int, float], peaks: dict[str, float]) -> Iterator[str]:
    yield f"| verification | {cost:.1%} of the CPU time of reading | |"
    once, ten = peaks["the data"], peaks["ten times the data"]
    yield f"| peak memory | {once:.0f} MB, over 10 times the data {ten:.0f} MB ({ten / once:.2f}) | flat |"
    yield f"| first batch from step 10^6 | {resumed[10**6]:.2f} s, from step 0 {resumed[0]:.2f} s | as from step 0 |"


if __name__ == "__main__":
    main()
