"""One optimizer step is the same on any number of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine
from calumma.platform.training.steps.held_out import HeldOutBatch

SIZE = 50  # of the vocabulary


def rows(step: int, number: int) -> HeldOutBatch:
    """Micro-batches with very different numbers of trained tokens: averaging averages would show."""
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(0, SIZE, (2, 17), generator=generator)
    return HeldOutBatch(tokens, torch.rand(2, 17, generator=generator) < 0.1 + 0.4 * number, torch.zeros_like(tokens))


def untrained(shape: ModelConfig) -> Transformer:
    return Transformer(shape.model_copy(update={"vocabulary_size": SIZE})).initialize(0)


def take_steps(rank: int, world: int, spec: PretrainSpecification, recompute: bool, folder: str) -> None:
    """A worker that takes three steps of three micro-batches; the first writes weights, losses and gradient norms."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world
    )
    assert spec.model is not None
    run = engine.initialize(untrained(spec.model).checkpoint_activations(recompute), spec, world)
    image_mask_V = torch.arange(SIZE) >= 40
    empty = HeldOutBatch(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
    seen = []
    for step in range(3):
        group = [rows(step, number) for number in range(rank, 3, world)]
        group += [empty] * (engine.micro_batches_a_worker(spec, world) - len(group))
        counts = engine.count(group, image_mask_V, run.device)
        local, stability = engine.step(
            run, group, counts, image_mask_V, 1e-3, world, (0, step, rank), measure=rank == 0 and step == 1
        )
        assert bool(stability) == (rank == 0 and step == 1)
        sums = engine.everywhere(local)
        seen.append([*sums.tolist(), *counts, float(run.get_global_grad_norm())])
    weights = engine.gathered_weights(run, keep=rank == 0)
    if rank == 0:
        torch.save({"weights": weights, "seen": seen}, f"{folder}/{world}.pt")


@pytest.mark.parametrize(("zero_stage", "recompute"), [(1, False), (3, False), (3, True)])
def test_one_and_two_workers_take_the_same_steps(
    stage: Callable[..., PretrainSpecification], shape: ModelConfig, tmp_path: Path, zero_stage: int, recompute: bool
) -> None:
    """Three micro-batches: two workers need an empty one. Dropout is on: it too follows the micro-batch. Stability is
    measured by one of them, and activations are recomputed or kept: neither changes a step."""
    spec = stage(zero_stage=zero_stage, optimizer={"learning_rate": 0.01, "eps": 1e-3})
    for world in (1, 2):
        torch.multiprocessing.spawn(take_steps, (world, spec, recompute, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert two["seen"] == [pytest.approx(values, rel=1e-4) for values in one["seen"]]
    initial = untrained(shape).state_dict()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=2e-5)
        assert not torch.equal(weight, initial[name])
