"""The data plane, measured: `python benchmarks/data.py` prints one table with its targets (10 minutes on two cores).

The same packed sequences are streamed in batches of --rows, as int64 and bool tensors, from local disk and from S3 (a
moto server in a process of its own): by calumma through Ray Data, by MosaicML Streaming and WebDataset with PyTorch's
DataLoader in their own virtual environment (made below build/ at the first run), and read in order with plain pyarrow.
The rivals are given the better of one and two worker processes. Of S3, Streaming and calumma's cache keep local copies
of whole shards from the first epoch on; the others ask for every part every time.
Memory over ten times the data goes to benchmarks/data_memory.png. `--quick` is a smoke test of the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from calumma.platform import cluster, storage
from calumma.platform.data import token_shards
from calumma.platform.data.cache import ShardCache
from calumma.platform.data.manifest import FileEntry, Footer, Manifest
from calumma.platform.data.packing import PackedRow
from calumma.platform.data.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ["mosaicml-streaming==0.13.0", "webdataset==1.0.2", "torch==2.13.0", "numpy==2.1.3"]
CONTEXT = 4096
GROUPS = 64  # row groups a shard
BUCKET = "calumma-benchmark"


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
    return FileEntry.of(
        path,
        data,
        rows=rows,
        row_groups=-(-rows // micro_batch),
        sequences_per_row_group=micro_batch,
        footer=token_shards.footer(data),
    )


# -- calumma --


def stream(
    uri: str,
    manifest: Manifest,
    batches: int,
    first_step: int = 0,
    verify: bool = True,
    cache: ShardCache | None = None,
) -> Speed:
    from calumma.platform.data.stream import PlanDataConfig, micro_batches

    began = time.perf_counter()
    steps = (first_step, first_step + batches)
    config = PlanDataConfig(1, {uri: 1.0}, {uri: manifest}, 1, *steps, verify=verify, cache=cache)
    (share,) = config.configure({}, 1, None, None)
    read = micro_batches(share["train"], 0, 1)
    return Speed.of((batch.tokens.numel() for _, group in read for batch in group), began)


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


# -- memory --


def memory(read: Callable[[], Speed]) -> list[tuple[float, float]]:
    """(seconds, MB) of this process and all it has started while `read` runs; memory that they share counts once,
    where it was allocated (USS)."""
    import psutil

    seen: list[tuple[float, float]] = []
    stop = threading.Event()
    began = time.monotonic()

    def sample() -> None:
        us = psutil.Process()
        running = True
        while running:
            running = not stop.wait(0.25)
            total = 0
            for process in [us, *us.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().uss
            seen.append((time.monotonic() - began, total / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        read()
    finally:
        stop.set()
        thread.join()
    return seen


def chart(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot([t for t, _ in curve], [mb for _, mb in curve], label=name)
    axes.set(xlabel="seconds of streaming", ylabel="MB, all processes", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


# -- plan and manifest --


def large_manifest(shards: int, row_groups: int) -> Manifest:
    def entry(number: int) -> FileEntry:
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        return FileEntry(
            path=f"tokens-0123abcd-{number:05d}-00000.parquet",
            bytes=10**8 + number,
            sha256=digest,
            rows=row_groups,
            row_groups=row_groups,
            tokens={"text": 6 * 10**5, "image": 4 * 10**5},
            sequences_per_row_group=1,
            footer=Footer(bytes=10**5, sha256=digest[::-1]),
        )

    return Manifest(kind="tokens", files=[entry(number) for number in range(shards)])


def plan_and_manifest(shards: int) -> tuple[float, float, float]:
    """Microseconds a step of 32, in blocks and alone, at 10^9 micro-batches; seconds to open the manifest."""
    whole = large_manifest(shards, 10**9 // shards)
    with tempfile.TemporaryDirectory() as folder:
        whole.write(folder)
        began = time.perf_counter()
        Manifest.read(folder)
        opened = time.perf_counter() - began
    third = shards // 3
    parts = {
        uri: whole.model_copy(update={"files": whole.files[begin : begin + third]})
        for uri, begin in (("a", 0), ("b", third), ("c", 2 * third))
    }
    plan = Plan(0, {"a": 0.5, "b": 0.3, "c": 0.2}, parts, 32)
    del whole, parts
    blocks, alone = [], []
    for start in (0, 10**6, 10**7):
        began = time.perf_counter()
        plan.named(plan.steps(start, start + 1000))
        blocks.append((time.perf_counter() - began) / 1000)
        for step in range(start, start + 100):
            began = time.perf_counter()
            plan.step(step)
            alone.append(time.perf_counter() - began)
    return median(blocks) * 1e6, median(alone) * 1e6, opened


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
    parser.add_argument("--sequences", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
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
    found: dict[str, dict[str, Speed]] = {"local disk": {}, "S3": {}}
    verified: dict[bool, float] = {}
    resumed: dict[int, float] = {}
    with cluster.embedded(lean=True):
        stream(here, manifest, 4)  # Ray's workers are there from now on
        for place, uri in (("local disk", here), ("S3", there)):
            found[place]["calumma"] = stream(uri, manifest, batches)
        cache = ShardCache(f"{folder}/cache", manifest.bytes)
        found["S3"]["calumma, cache"] = stream(there, manifest, batches, cache=cache)
        for check in (True, False):
            verified[check] = max(stream(here, manifest, batches, verify=check).tokens for _ in range(3))
        for step in (0, 10**6):
            resumed[step] = median(stream(here, manifest, 4, first_step=step).first for _ in range(5))
        big = f"{folder}/big"
        more = copies(here, big, manifest, 10)
        curves = {
            "the data": memory(lambda: stream(here, manifest, batches)),
            "ten times the data": memory(lambda: stream(big, more, 10 * batches // given.epochs)),
        }
    chart(curves, ROOT / ("build" if given.quick else "benchmarks") / "data_memory.png")
    for place, uri in (("local disk", here), ("S3", there)):
        base = folder if place == "local disk" else f"s3://{BUCKET}"
        found[place]["pyarrow"] = pyarrow_alone(uri, manifest, given.epochs)
        for name in ("mds", "mds-zstd", "wds"):
            speed = rival_speed(python, name[:3], f"{base}/{name}", given.rows, given.epochs)
            label = {"mds": "Streaming", "mds-zstd": "Streaming, zstd", "wds": "WebDataset"}[name]
            found[place][label] = speed
    return [
        *speeds(found),
        *others(verified, resumed, {name: max(mb for _, mb in curve) for name, curve in curves.items()}),
        *plans(*plan_and_manifest(given.shards)),
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


def speeds(found: dict[str, dict[str, Speed]]) -> Iterator[str]:
    """Streaming is measured against calumma as it works itself: with copies of shards, where those are not local."""
    for place, by_name in found.items():
        direct = by_name["calumma"]
        copied = by_name.get("calumma, cache", direct)
        for name, speed in by_name.items():
            ours = copied if "Streaming" in name else direct
            target = {"pyarrow": "calumma >= 0.8 of it"}.get(name, "calumma >= 2 of it" if "Streaming" in name else "")
            said = "" if "calumma" in name else f"; calumma: {ours.tokens / speed.tokens:.2f} of it"
            yield (
                f"| {place}, {name} | {speed.tokens / 1e6:.1f} M tokens/s, first batch {speed.first:.2f} s{said} | "
                f"{target} |"
            )


def others(verified: dict[bool, float], resumed: dict[int, float], peaks: dict[str, float]) -> Iterator[str]:
    cost = 1 - verified[True] / verified[False]
    yield f"| verification | {cost:.1%} of the tokens/s | |"
    once, ten = peaks["the data"], peaks["ten times the data"]
    yield f"| peak memory | {once:.0f} MB, over 10 times the data {ten:.0f} MB ({ten / once:.2f}) | flat |"
    yield f"| first batch from step 10^6 | {resumed[10**6]:.2f} s, from step 0 {resumed[0]:.2f} s | as from step 0 |"


def plans(blocks: float, alone: float, opened: float) -> Iterator[str]:
    yield f"| plan, 10^9 micro-batches, 32 a step | {blocks:.0f} µs a step ({alone:.0f} µs one by one) | < 50 µs |"
    yield f"| opening a manifest of 100,000 shards | {opened:.2f} s | < 2 s |"


if __name__ == "__main__":
    main()
