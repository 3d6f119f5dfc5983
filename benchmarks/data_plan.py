"""Plan and manifest of very much data: `python benchmarks/data_plan.py` prints two rows of `benchmarks/data.py`, which
need nothing but one core, some seconds and 2 GB of memory.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median

from calumma.platform.storage.manifest import FileEntry, FooterDigest, Manifest
from calumma.platform.streaming.plan import Plan


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
            footer=FooterDigest(bytes=10**5, sha256=digest[::-1]),
        )

    return Manifest(kind="tokens", files=[entry(number) for number in range(shards)])


def plan_and_manifest(shards: int) -> tuple[dict[str, float], float]:
    """Microseconds a step of 32 at 10^9 micro-batches, by how it is asked for; seconds to open the manifest."""
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
    asked: dict[str, Callable[[int], object]] = {
        "a thousand at once": lambda start: plan.to_micro_batches(plan.steps(start, start + 1000)),
        "one after the other": lambda start: [plan.step(n) for n in range(start, start + 1000)],
        "anywhere": lambda start: [plan.step(start + 7919 * n) for n in range(1000)],
    }
    found: dict[str, float] = {}
    for name, ask in asked.items():
        times = []
        for start in (0, 10**6, 10**7, 10**7 + 5000, 10**7 + 10000):
            began = time.perf_counter()
            ask(start)
            times.append((time.perf_counter() - began) / 1000)
        found[name] = median(times) * 1e6
    return found, opened


def plans(shards: int, asked: dict[str, float], opened: float) -> Iterator[str]:
    said = ", ".join(f"{name} {time:.0f}" for name, time in asked.items())
    yield f"| plan, 10^9 micro-batches, 32 a step | µs a step: {said} | < 50 µs |"
    yield f"| opening a manifest of {shards:,} shards | {opened:.2f} s | < 2 s |"


if __name__ == "__main__":
    print("\n".join(plans(100_000, *plan_and_manifest(100_000))))
