"""Seconds, days and dollars of a training, and the bytes that it sends.

A step is arithmetic at a stated utilization of the GPUs' peak, and collectives at a share of what their links are sold
as. Where DeepSpeed overlaps the two (`overlap_comm`, as ever in ZeRO 3) the longer of them counts, else both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calumma.model.config import ModelConfig
from calumma.platform.streaming.division import Division
from calumma.platform.training.forecast import shape
from calumma.platform.training.forecast.machines import GBIT, Machine
from calumma.platform.training.forecast.memory import selective, wire_bytes
from calumma.platform.training.forecast.shape import Sizes
from calumma.platform.training.specification import TrainSpecification

UTILIZATION = 0.4  # of the peak, by all arithmetic of a step
LINK_SHARE = 0.7  # of a link's bandwidth that collectives reach
STORAGE = 25 * GBIT  # bytes a second between a machine and object storage
START = (
    90.0  # seconds from a lost worker to one that computes, without what it reads: notice, processes, libraries, NCCL
)
DAY = 86400.0
REUSED = 1e9  # parameters within which ZeRO 3 keeps gathered what is used again, `stage3_max_reuse_distance`


@dataclass(frozen=True)
class Rates:
    """What a forecast takes for granted."""

    utilization: float = UTILIZATION
    storage: float = STORAGE
    start: float = START


@dataclass(frozen=True)
class Time:
    """Of a training on so many workers."""

    arithmetic_seconds: float
    network_bytes: float
    """What each worker sends a step."""
    network_seconds: float
    step_seconds: float
    efficiency: float
    """What workers that have less to do than the busiest leave of the speed."""
    tokens_per_second: float
    checkpoint_bytes: float
    checkpoint_seconds: float
    restart_seconds: float
    """From a lost worker to a group that goes on from the last checkpoint."""
    lost_seconds: float
    """Of steps that are then taken again, on average."""
    days: float
    dollars: float | None


def network_bytes(
    spec: TrainSpecification, config: ModelConfig, settings: dict[str, Any], world: int, passes: int
) -> float:
    """What each worker sends in a step (and receives as much), rings of all workers taken."""
    if world == 1:
        return 0.0
    sizes, element = Sizes.of(config, spec), 4 if spec.precision == "float32" else 2
    gradients, weights = wire_bytes(settings, element) * sizes.trained, element * (sizes.total + sizes.added)
    if spec.zero_stage == 0:
        sent = 2.0 * gradients  # all-reduce: each part to its owner, and back from there
    elif spec.zero_stage < 3:  # all-reduce as well (`use_multi_rank_bucket_allreduce`): once, or after every pass
        sent = 2.0 * gradients * (passes if spec.zero_stage == 2 else 1) + element * sizes.trained
    else:  # weights come for the forward and the backward pass; for a second forward pass too where a block is large
        block = sum(rows * columns for rows, columns in shape.block_matrices(config).values())
        again = spec.checkpoint_activations and 2 * block > REUSED
        gathers = 1 if sizes.total <= REUSED else passes * (3 if again else 2)
        sent = passes * gradients + gathers * weights
    return sent * (world - 1) / world


def exchanged_bytes(spec: TrainSpecification, config: ModelConfig, rows: int) -> float:
    """What each worker sends in a step to those that share its `rows` with it: in each block queries, keys, values and
    attention's result, there and back, and there again where they are recomputed."""
    size, element = spec.sequence_parallel, 4 if spec.precision == "float32" else 2
    token = 2 * element * config.head_size * (config.heads + config.kv_heads)
    turns = 3 if spec.checkpoint_activations else 2
    return rows * config.context / size * config.layers * token * turns * (size - 1) / size


def times(
    spec: TrainSpecification,
    config: ModelConfig,
    settings: dict[str, Any],
    machine: Machine,
    count: int,
    world: int,
    division: Division,
    rates: Rates,
) -> Time | None:
    """On `count` machines of a kind; none where it has no GPUs, whose speed is known."""
    if machine.kind is None:
        return None
    gpu, sizes, passes = machine.kind, Sizes.of(config, spec), division.passes(world)
    peak = gpu.float32 if spec.precision == "float32" else gpu.bfloat16
    tokens = division.sequences * config.context
    busiest = division.most(world) * config.context / division.sharing
    recompute = bool(spec.checkpoint_activations) and not selective(spec)
    arithmetic = busiest * shape.flops_per_token(config, recompute) / (peak * rates.utilization)
    sent = network_bytes(spec, config, settings, world, passes)
    outside = min(gpu.link, machine.network / machine.gpus)
    network = sent / ((gpu.link if count == 1 else outside) * LINK_SHARE)
    exchanged = exchanged_bytes(spec, config, division.most(world))
    # neighbours by rank are on one machine as long as it has room for all that share rows
    exchange = exchanged / ((gpu.link if division.sharing <= machine.gpus else outside) * LINK_SHARE)
    overlapped = settings["zero_optimization"].get("overlap_comm", spec.zero_stage == 3)
    step = exchange + (max(arithmetic, network) if overlapped else arithmetic + network)
    state = (4 if spec.precision == "float32" else 2) * (sizes.total + sizes.added) + 12 * sizes.trained
    writing = state / (count * rates.storage)
    every = min(spec.checkpoint_every, spec.steps)
    days = (spec.steps * step + spec.steps / every * writing) / DAY
    return Time(
        arithmetic_seconds=arithmetic,
        network_bytes=sent + exchanged,
        network_seconds=network + exchange,
        step_seconds=step,
        efficiency=division.efficiency(world),
        tokens_per_second=tokens / step,
        checkpoint_bytes=state,
        checkpoint_seconds=writing,
        restart_seconds=rates.start + writing,
        lost_seconds=every * step / 2,
        days=days,
        dollars=None if machine.price is None else days * 24 * count * machine.price,
    )
