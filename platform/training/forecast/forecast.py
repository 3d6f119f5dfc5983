"""Would a job run on these machines: what it needs, what there is, and of what does not fit the setting that would.

A group may shrink to its fewest workers, so memory must do for those; everything else is told for as many as fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from calumma.model.config import ModelConfig
from calumma.platform.specification import JobSpecification
from calumma.platform.streaming.division import Division
from calumma.platform.training.forecast.machines import Machines
from calumma.platform.training.forecast.memory import Memory, gpu_memory, host_disk, host_memory, pass_rows
from calumma.platform.training.forecast.pace import Rates, Time, times
from calumma.platform.training.forecast.shape import Sizes
from calumma.platform.training.specification import TrainSpecification

STEADY = 0.95  # of proportional speed: below it workers wait for each other enough to be told


@dataclass(frozen=True)
class Problem:
    """What does not fit, and what would."""

    field: str
    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.advice}"


@dataclass(frozen=True)
class Forecast:
    """Of a job on machines of one kind. Sizes are bytes."""

    machine: str
    machines: int
    """That are used."""
    workers: int
    """As many as fit, of those asked for."""
    problems: list[Problem]
    warnings: list[str]
    parameters: int | None = None
    trained: int | None = None
    rows_per_pass: int | None = None
    passes: int | None = None
    memory: Memory | None = None
    """Of the busiest GPU with as many workers as fit."""
    memory_of_fewest: float | None = None
    """The same in all, with the fewest workers that the job goes on with."""
    gpu_memory: float | None = None
    host_memory: float | None = None
    host_has: float = 0.0
    host_disk: float | None = None
    """Of a host's own disk, for `recovery.node_local`."""
    host_disk_has: float | None = None
    time: Time | None = None

    @property
    def fits(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Training:
    """What is trained: a specification, the architecture that it settles on, and its token shards."""

    spec: TrainSpecification
    config: ModelConfig
    micro_batch: int
    """Sequences of a micro-batch of the token shards."""

    @property
    def division(self) -> Division:
        sequences = self.spec.micro_batches * self.micro_batch
        rows = self.spec.rows_per_pass or self.micro_batch
        return Division(sequences, rows, self.config.dropout > 0, self.spec.sequence_parallel)

    def settings(self, world: int) -> dict[str, Any]:
        """DeepSpeed's."""
        from calumma.platform.training.steps.deepspeed_settings import deepspeed_config

        return deepspeed_config(self.spec, world, Sizes.of(self.config, self.spec).total, self.division.passes(world))

    def gpu(self, world: int) -> Memory:
        return gpu_memory(self.spec, self.config, self.settings(world), world, pass_rows(self.division, world))

    def host(self, world: int, local: int) -> float:
        return host_memory(self.spec, self.config, self.settings(world), world, local)

    def disk(self, world: int, local: int) -> float:
        return host_disk(self.spec, self.config, world, local)

    def changed(self, **fields: Any) -> Training:
        values = self.spec.model_dump() | fields
        return replace(self, spec=type(self.spec).model_validate(values))


def forecast_job(spec: JobSpecification, machines: Machines) -> Forecast:
    """Of a job that trains no Transformer: whether its workers have their place."""
    workers, problems = _place(spec, machines)
    return Forecast(machines.machine.name, _used(spec, machines, workers), workers, problems, [])


def forecast(training: Training, machines: Machines, rates: Rates = Rates()) -> Forecast:
    """Of a training, on machines of one kind."""
    spec, config, machine = training.spec, training.config, machines.machine
    workers, problems = _place(spec, machines)
    fewest, sizes, division = spec.resources.min_workers, Sizes.of(config, spec), training.division
    problems += _idle(training) + _indivisible(training)
    count = _used(spec, machines, workers)
    local, warnings = -(-workers // count), list[str]()
    memory, smallest = training.gpu(workers), training.gpu(fewest)
    host = max(training.host(workers, local), training.host(fewest, min(fewest, local)))
    room = machine.kind.memory if machine.kind and spec.resources.gpus_per_worker else None
    if room is not None and max(memory.total, smallest.total) > room:
        problems.append(_too_large(training, room, fewest, workers))
    if host > machine.memory:
        problems.append(
            Problem(
                "resources.workers",
                f"a host with {local} workers needs {_gb(host)}, a {machine.name} has {_gb(machine.memory)}",
                "take machines with more memory for each GPU, or offload nothing to their hosts",
            )
        )
    disk = max(training.disk(workers, local), training.disk(fewest, min(fewest, local)))
    if machine.disk is not None and disk > machine.disk:
        problems.append(
            Problem(
                "resources.recovery.node_local",
                f"a host with {local} workers keeps {_gb(disk)} of checkpoints on its own disk, a {machine.name} has "
                f"{_gb(machine.disk)}",
                "leave it away, or take more machines, each of which then keeps less",
            )
        )
    if not problems and division.efficiency(workers) < STEADY:
        warnings.append(_uneven(division, workers))
    time = None
    if spec.resources.gpus_per_worker:
        time = times(spec, config, training.settings(workers), machine, count, workers, division, rates)
    if time is not None and time.network_seconds > time.arithmetic_seconds:
        warnings.append(
            f"collectives take {time.network_seconds:.1f} s a step, arithmetic {time.arithmetic_seconds:.1f} s: fewer, "
            "larger passes (rows_per_pass), or a lower zero_stage where memory allows, send less"
        )
    return Forecast(
        machine=machine.name,
        machines=count,
        workers=workers,
        problems=problems,
        warnings=warnings,
        parameters=sizes.total,
        trained=sizes.trained,
        rows_per_pass=pass_rows(division, workers),
        passes=division.passes(workers),
        memory=memory,
        memory_of_fewest=smallest.total,
        gpu_memory=room,
        host_memory=host,
        host_has=machine.memory,
        host_disk=disk or None,
        host_disk_has=machine.disk,
        time=time,
    )


def _room(spec: JobSpecification, machines: Machines) -> int:
    """Workers that a machine has room for; a CPU of it stays free to read data."""
    resources, machine = spec.resources, machines.machine
    room = int((machine.cpus - 1) / resources.cpus_per_worker + 1e-9)
    if resources.gpus_per_worker:
        room = min(room, int(machine.gpus / resources.gpus_per_worker + 1e-9))
    return max(room, 0)


def _place(spec: JobSpecification, machines: Machines) -> tuple[int, list[Problem]]:
    """Workers that have their place, of those asked for, and what hinders the others."""
    resources, room = spec.resources, _room(spec, machines)
    offered = room * machines.count
    if offered >= resources.min_workers:
        multiple = spec.sequence_parallel if isinstance(spec, TrainSpecification) else 1
        return max(1, min(offered, resources.max_workers) // multiple * multiple), []
    each = f"{resources.gpus_per_worker:g} GPU and {resources.cpus_per_worker:g} CPU each"
    asked = f"at least {resources.min_workers} workers with {each} are asked for, {machines.count} x "
    message = f"{asked}{machines.machine.name} have room for {offered}"
    if not offered:
        advice = "take machines with more GPUs or CPUs, or ask for less per worker"
    elif resources.min_workers < resources.max_workers:
        advice = f"set min to {offered} or less, or use {-(-resources.min_workers // room)} of these machines"
    else:
        advice = f"set it to {offered} or less, or use {-(-resources.min_workers // room)} of these machines"
    return max(1, resources.min_workers), [Problem("resources.workers", message, advice)]


def _used(spec: JobSpecification, machines: Machines, workers: int) -> int:
    return max(1, -(-workers // max(1, _room(spec, machines))))


def _idle(training: Training) -> list[Problem]:
    """More workers are asked for than a global batch has parts."""
    division, asked = training.division, training.spec.resources.max_workers
    parts = -(-division.sequences // division.unit) * division.sharing
    if asked <= parts:
        return []
    what = "sequences" if division.unit == 1 else f"passes of {division.unit} sequences"
    if division.sharing > 1:
        what += f", each for {division.sharing} workers"
    advice = f"set resources.workers to at most {parts}"
    if division.unit > 1:
        advice += f", or rows_per_pass: 1 for {division.sequences * division.sharing} parts"
    return [
        Problem(
            "resources.workers",
            f"a global batch has {parts // division.sharing} {what}, {asked - parts} of {asked} workers would be idle",
            advice,
        )
    ]


def _indivisible(training: Training) -> list[Problem]:
    """What workers cannot share as they are asked to."""
    from calumma.platform.training.steps.sequence import indivisible

    size, config = training.spec.sequence_parallel, training.config
    found = ", ".join(indivisible(config, config.context, size))
    advice = "give a divisor of heads, key-value heads and context"
    return [Problem("sequence_parallel", f"{size} workers cannot share {found}", advice)] if found else []


def _uneven(division: Division, workers: int) -> str:
    most = division.most(workers)
    as_fast = -(-division.sequences // most)
    return (
        f"{workers} workers share {division.sequences} sequences at {division.efficiency(workers):.0%} of proportional "
        f"speed: the busiest has {most}; {as_fast} workers take as long for a step"
    )


def _too_large(training: Training, room: float, fewest: int, workers: int) -> Problem:
    """What a GPU would need, and the fewest settings that make it fit."""

    def needs(one: Training) -> float:
        return max(one.gpu(world).total for world in {fewest, workers})

    needed = needs(training)
    memory = max((training.gpu(world) for world in {fewest, workers}), key=lambda found: found.total)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "buffers": memory.buffers,
    }
    most = sorted(parts.items(), key=lambda part: -part[1])[:2]
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in most)
    muon = training.spec.optimizer.kind == "muon"
    field = "rows_per_pass" if most[0][0] == "activations" else "optimizer" if muon else "zero_stage"
    message = f"{_gb(needed)} a GPU are needed with {fewest} workers (of them {listed}), there are {_gb(room)}"
    for changes in _remedies(training):
        fields = {key: value for change in changes for key, value in change.items()}
        changed = training.changed(**fields)
        if needs(changed) <= room:
            said = ", ".join(_said(key, value) for key, value in fields.items())
            return Problem(field, message, f"set {said}, which needs {_gb(needs(changed))}")
    for world in (2**power for power in range(1, 14)):
        if world > workers and training.gpu(world).total <= room:
            return Problem(field, message, f"use at least {world} workers (resources.workers.min: {world})")
    return Problem(field, message, "take GPUs with more memory: no setting makes it fit on these")


def _remedies(training: Training) -> Iterator[tuple[dict[str, Any], ...]]:
    """Changes of a specification that save memory, the fewest and the least costly first."""
    spec = training.spec
    single: list[dict[str, Any]] = []
    if not spec.checkpoint_activations:
        single.append({"checkpoint_activations": True})
    if training.division.rows > 1:
        single.append({"rows_per_pass": 1})
    # muon moves whole matrices, which only stage 0 has
    whole = {"optimizer": spec.optimizer.model_dump() | {"kind": "adamw"}} if spec.optimizer.kind == "muon" else {}
    single += [{"zero_stage": stage} | whole for stage in (2, 3) if stage > spec.zero_stage]
    if spec.offload.optimizer == "none" and spec.zero_stage:
        single.append({"offload": spec.offload.model_dump() | {"optimizer": "cpu"}})
    for number in range(1, 5):
        for found in combinations(single, number):
            keys = [key for change in found for key in change]
            if len(set(keys)) == len(keys):
                yield found


def _said(key: str, value: Any) -> str:
    return f"optimizer.kind: {value['kind']}" if key == "optimizer" else f"{key}: {_yaml(value)}"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items() if v not in (None, "none", True)) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
