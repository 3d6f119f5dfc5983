"""Machines that a cluster is made of, and the clusters that a person or a cluster file describes.

Facts of AWS's instance types: its pages of P4, P5, P6 and G6e instances (CPUs, memory, network, disks). Prices in
dollars an hour, the machine: EC2 Capacity Blocks for ML, end of 2024 (P4, P5), else on demand in us-west-2; they
change, and `--price` has the last word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calumma.model.devices import GPUS, Gpu, find_gpu
from calumma.platform.specification import SpecificationError

GIB, GBIT, TB = 2**30, 1e9 / 8, 1e12


@dataclass(frozen=True)
class Machine:
    """A kind of machine with equal GPUs, or none."""

    name: str
    gpu: str | None
    gpus: int
    cpus: int
    memory: float
    """Bytes of the host."""
    network: float
    """Bytes a second that it sends to other machines."""
    price: float | None = None
    """Dollars an hour."""
    disk: float | None = None
    """Bytes of its own NVMe disks together; none: not known."""

    @property
    def kind(self) -> Gpu | None:
        return GPUS[self.gpu] if self.gpu else None


@dataclass(frozen=True)
class Machines:
    """So many of a kind."""

    machine: Machine
    count: int

    @property
    def gpus(self) -> int:
        return self.machine.gpus * self.count


INSTANCES = {
    machine.name: machine
    for machine in (
        Machine("p4d.24xlarge", "A100-SXM4-40GB", 8, 96, 1152 * GIB, 400 * GBIT, 14.75, disk=8 * 1.0 * TB),
        Machine("p4de.24xlarge", "A100", 8, 96, 1152 * GIB, 400 * GBIT, disk=8 * 1.0 * TB),
        Machine("p5.48xlarge", "H100", 8, 192, 2048 * GIB, 3200 * GBIT, 39.33, disk=8 * 3.84 * TB),
        Machine("p5e.48xlarge", "H200", 8, 192, 2048 * GIB, 3200 * GBIT, 43.26, disk=8 * 3.84 * TB),
        Machine("p5en.48xlarge", "H200", 8, 192, 2048 * GIB, 3200 * GBIT, disk=8 * 3.84 * TB),
        Machine("p6-b200.48xlarge", "B200", 8, 192, 2048 * GIB, 3200 * GBIT, disk=8 * 3.84 * TB),
        Machine("g6e.12xlarge", "L40S", 4, 48, 384 * GIB, 100 * GBIT, 10.49, disk=2 * 1.9 * TB),
        Machine("g6e.48xlarge", "L40S", 8, 192, 1536 * GIB, 400 * GBIT, 30.13, disk=4 * 1.9 * TB),
        Machine("g6.12xlarge", "L4", 4, 48, 192 * GIB, 40 * GBIT, 4.60, disk=4 * 0.94 * TB),
        Machine("m7i.4xlarge", None, 0, 16, 64 * GIB, 12.5 * GBIT, 0.81),
        Machine("m7i.8xlarge", None, 0, 32, 128 * GIB, 12.5 * GBIT, 1.61),
    )
}
# What `--nodes` means by 8xH100, where no instance type is named.
_USUAL = {"H100": "p5.48xlarge", "H200": "p5e.48xlarge", "B200": "p6-b200.48xlarge", "A100": "p4de.24xlarge",
          "A100-SXM4-40GB": "p4d.24xlarge", "L40S": "g6e.48xlarge"}  # fmt: skip
_CPUS, _MEMORY, _NETWORK = 12, 128 * GIB, 25 * GBIT  # a GPU's share of a machine that nobody has described


def parse_nodes(text: str) -> Machines:
    """`8xH100`: a machine with 8; `16x8xH100`: 16 of them; `4xp5.48xlarge`. Raises SpecificationError."""
    name = next((name for name in INSTANCES if text.endswith(name)), text.rpartition("x")[2])
    numbers = [number for number in text.removesuffix(name).split("x") if number]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise SpecificationError(f"--nodes: {text!r} is not like 8xH100, 16x8xH100 or 2xp5.48xlarge")
    counts = [int(number) for number in numbers]
    if name in INSTANCES:
        if len(counts) > 1:
            raise SpecificationError(f"--nodes: {name} has its GPUs by itself; say how many machines: 2x{name}")
        return Machines(INSTANCES[name], counts[0] if counts else 1)
    found = find_gpu(name)
    if found is None or len(counts) not in (1, 2):
        raise SpecificationError(
            f"--nodes: {text!r} is not like 8xH100 (a machine with 8), 16x8xH100 (16 of them) or 2xp5.48xlarge; known "
            f"are the GPUs {', '.join(GPUS)} and the machines {', '.join(INSTANCES)}"
        )
    count, gpus = counts if len(counts) == 2 else (1, counts[0])
    kind = found[0]
    usual = INSTANCES.get(_USUAL.get(kind, ""))
    if usual is not None and usual.gpus == gpus:
        return Machines(usual, count)
    price = None if usual is None or usual.price is None else usual.price * gpus / usual.gpus
    network = _NETWORK if usual is None else usual.network * min(1.0, gpus / usual.gpus)
    machine = Machine(f"{gpus} x {kind}", kind, gpus, _CPUS * gpus, _MEMORY * gpus, network, price)
    return Machines(machine, count)


def read_cluster_file(path: str | Path) -> list[Machines]:
    """The kinds of machines of a cluster file for `ray up`, each with the most there may be of it. Raises
    SpecificationError."""
    import yaml

    try:
        values: Any = yaml.safe_load(Path(path).read_text())
        types, head = dict(values["available_node_types"]), values.get("head_node_type")
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise SpecificationError(f"--cluster: {path} is no cluster file of Ray's ({error})") from error
    found, room = list[Machines](), int(values.get("max_workers", 2**31))
    for name, kind in types.items():
        instance = (kind.get("node_config") or {}).get("InstanceType")
        count = 1 if name == head else min(int(kind.get("max_workers", room)), room)
        if instance not in INSTANCES:
            raise SpecificationError(
                f"--cluster: {path}: {name} is of the type {instance}; known are {', '.join(INSTANCES)}. Describe the "
                "machines with --nodes instead"
            )
        if count:
            found.append(Machines(INSTANCES[instance], count))
    return found
