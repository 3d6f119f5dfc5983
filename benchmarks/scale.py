"""A group of 0 to 1,024 workers on 1.1 million token shards, simulated on one machine: `python benchmarks/scale.py`.

What runs is the plan and the layout of datasets that training uses, with a Ray cluster in this process; the workers
alone are not there. Measured: the speed that the division of a global batch leaves at every number of workers; the time
that laying out a dataset takes; the bytes that reach a group, with the plan as one object of the cluster and with a
copy in every dataset. Writes `scale.png` beside the script and prints a table. `--quick` is a smoke test.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import time
from pathlib import Path
from typing import Any

import cloudpickle

from calumma.platform.cluster import connection
from calumma.platform.storage.manifest import FileEntry, FooterDigest, Manifest
from calumma.platform.streaming.division import Division
from calumma.platform.streaming.tensors import PlanData

SEQUENCES = {"7B": 2048, "34B": 3072}  # of a global batch, paper section 2.3
STEPS = 100_000
A_MACHINE = 8  # workers


def manifest(shards: int) -> Manifest:
    """Of 256 micro-batches of two sequences each, as chameleon-7b/tokenize.yaml cuts them, in half of a shard."""
    entries = []
    for number in range(shards):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        entries.append(
            FileEntry.model_construct(  # not checked again: it would take minutes
                path=f"tokens-0123abcd-{number:07d}-00000.parquet",
                bytes=10**7 + number,
                sha256=digest,
                rows=512,
                row_groups=256,
                tokens={"text": 10**6, "image": 10**6},
                sequences_per_row_group=2,
                footer=FooterDigest.model_construct(bytes=10**5, sha256=digest[::-1]),
            )
        )
    return Manifest.model_construct(kind="tokens", files=entries, specification={"context": 4096}, report={}, inputs={})


class Measured:
    """The layout of groups of several sizes."""

    def __init__(self, shards: int, sizes: list[int]) -> None:
        uri = "s3://simulated/tokens"
        manifests = {uri: manifest(shards)}
        began = time.perf_counter()
        self.config = PlanData(0, {uri: 1.0}, manifests, 1024, STEPS)
        self.making = time.perf_counter() - began
        self.plan_bytes = len(pickle.dumps(self.config.plan, protocol=5))
        began = time.perf_counter()
        self.config.shards(1)[0].iterator(0)  # the first group's start puts the plan, and imports Ray Data
        self.start = time.perf_counter() - began
        self.layout: dict[int, float] = {}
        for world in sizes:
            began = time.perf_counter()
            shards = self.config.shards(world)
            shards[-1].iterator(0)
            self.layout[world] = time.perf_counter() - began
        self.dataset_bytes = self._travelling(shards[-1])
        began = time.perf_counter()
        for rank in range(0, sizes[-1], max(1, sizes[-1] // 16)):
            self.config.plan.shares(0, 1, rank, sizes[-1])
        self.first_step = (time.perf_counter() - began) / 16

    def _travelling(self, shard: Any) -> int:
        """Bytes that a worker is sent: its share of the plan, without what the reference in it stands for."""
        from ray._private.worker import global_worker

        with io.BytesIO() as written:
            context = global_worker.get_serialization_context()
            value = context.serialize(shard)
            written.write(value.to_bytes())
            return len(written.getvalue()) or len(cloudpickle.dumps(shard))


def speeds(sequences: int, together: int, sizes: range) -> list[float]:
    """Of each number of workers, over that of one; `together`: sequences that stay so."""
    division = Division(sequences, together, whole=True)
    return [world * division.efficiency(world) for world in sizes]


def draw(found: Measured, target: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = range(1, 1025)
    figure = Figure(figsize=(13, 3.8), layout="tight")
    FigureCanvasAgg(figure)
    speed, layout, traffic = figure.subplots(1, 3)
    speed.plot(sizes, sizes, color="grey", linewidth=0.8, label="proportional")
    speed.plot(sizes, speeds(2048, 1, sizes), label="by sequences")
    speed.plot(sizes, speeds(2048, 2, sizes), linewidth=0.8, label="by micro-batches of two")
    speed.set(xlabel="workers", ylabel="speed over one worker", title="7B's global batch: 2,048 sequences")
    layout.plot(list(found.layout), [1000 * seconds for seconds in found.layout.values()], marker=".")
    layout.set(xlabel="workers", ylabel="ms a worker", ylim=(0, None), title="laying out the datasets of a group")
    machines = [-(-world // A_MACHINE) for world in sizes]
    once = [
        (number * found.plan_bytes + world * found.dataset_bytes) / 1e9
        for number, world in zip(machines, sizes, strict=True)
    ]
    copies = [world * (found.plan_bytes + found.dataset_bytes) / 1e9 for world in sizes]
    traffic.plot(sizes, once, label="one object, fetched by each machine")
    traffic.plot(sizes, copies, label="a copy for each worker")
    traffic.set(xlabel="workers", ylabel="GB", title="plan sent to the group")
    for axes in (speed, traffic):
        axes.legend(fontsize=8)
    figure.savefig(target, dpi=110)


def table(found: Measured, shards: int) -> list[str]:
    most = max(found.layout)
    slowest = max(found.layout.values())
    rows = [
        ("plan made", f"{found.making:.1f} s", f"{shards:,} shards"),
        ("first group: plan put, Ray Data imported", f"{found.start:.1f} s", "once"),
        ("plan, once a machine", f"{found.plan_bytes / 1e6:.1f} MB", ""),
        ("dataset, to each worker", f"{found.dataset_bytes / 1e3:.1f} kB", f"of {most:,}"),
        ("layout a worker", f"{1000 * slowest:.1f} ms", "at most, < 100 ms"),
        ("a worker's first step looked up", f"{1000 * found.first_step:.1f} ms", ""),
    ]
    for name, sequences in SEQUENCES.items():
        division = Division(sequences, 1)
        for whole in (sequences // 128, sequences // 64, sequences // 32, sequences // 19):
            least = min(division.efficiency(world) for world in range(whole // 2, whole + 1))
            told = f"with any of {whole // 2} to {whole} workers"
            rows.append((f"{name}: least of proportional speed", f"{least:.1%}", told))
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shards and workers")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("scale.png"))
    given = parser.parse_args()
    shards, sizes = (1000, [1, 8]) if given.quick else (1_100_000, [1, 8, 64, 256, 512, 1024])
    with connection.embedded(lean=True):
        found = Measured(shards, sizes)
    draw(found, given.output)
    print("| what | measured | |\n| --- | --- | --- |")
    print("\n".join(table(found, shards)))


if __name__ == "__main__":
    main()
