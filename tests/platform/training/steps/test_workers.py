"""One optimizer step is the same on any number of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import deepspeed_settings, engine
from calumma.platform.training.steps.held_out import HeldOutBatch

SIZE = 50  # of the vocabulary


def rows(step: int, number: int) -> HeldOutBatch:
    """Micro-batches with very different numbers of trained tokens: averaging averages would show."""
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(0, SIZE, (2, 17), generator=generator)
    return HeldOutBatch(
        tokens, torch.rand(2, 17, generator=generator) < 0.1 + 0.4 * number, torch.zeros_like(tokens), number
    )


def untrained(shape: ModelConfig) -> Transformer:
    return Transformer(shape.model_copy(update={"vocabulary_size": SIZE})).initialize(0)


Variants = dict[str, PretrainSpecification]


def work(rank: int, world: int, variants: Variants, folder: str) -> None:
    """A worker that takes three steps of three micro-batches of each variant; the first one writes down weights, losses
    and gradient norms."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world
    )
    found = {name: take_steps(rank, world, spec) for name, spec in variants.items()}
    if rank == 0:
        torch.save(found, f"{folder}/{world}.pt")


def take_steps(rank: int, world: int, spec: PretrainSpecification) -> dict[str, Any]:
    assert spec.model is not None
    run = engine.initialize(untrained(spec.model).checkpoint_activations(spec.checkpoint_activations), spec, world)
    image_mask_V = torch.arange(SIZE) >= 40
    empty = HeldOutBatch(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
    seen = []
    for step in range(3):
        group = [rows(step, number) for number in range(rank, 3, world)]
        group += [empty] * (deepspeed_settings.micro_batches_a_worker(spec, world) - len(group))
        counts = engine.count_tokens(group, image_mask_V, run.device)
        local, stability = engine.step(
            run, group, counts, image_mask_V, 1e-3, world, (0, step), measure=rank == 0 and step == 1
        )
        assert bool(stability) == (rank == 0 and step == 1)
        sums = engine.sum_over_workers(local)
        seen.append([*sums.tolist(), *counts, float(run.get_global_grad_norm())])
    return {"weights": engine.gathered_weights(run, keep=rank == 0), "seen": seen}


VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2, overlapped": {"zero_stage": 2, "overlap_communication": True},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 3, recomputed": {"zero_stage": 3, "checkpoint_activations": True},
    "ZeRO 3, recomputed selectively, overlapped": {
        "zero_stage": 3,
        "checkpoint_activations": "selective",
        "overlap_communication": True,
    },
}
MUON = "Muon, whose matrices are divided"


@pytest.fixture(scope="module")
def found(
    stage: Callable[..., PretrainSpecification], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """What one worker and what two have seen."""
    folder = tmp_path_factory.mktemp("workers")
    optimizer = {"learning_rate": 0.01, "eps": 1e-3}
    variants = {name: stage(optimizer=optimizer, **fields) for name, fields in VARIANTS.items()}
    variants[MUON] = stage(optimizer=optimizer | {"kind": "muon"}, zero_stage=0)
    for world in (1, 2):
        torch.multiprocessing.spawn(work, (world, variants, str(folder)), nprocs=world)
    return {world: torch.load(folder / f"{world}.pt") for world in (1, 2)}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_takes_the_steps_of_the_plain_one(found: dict[int, dict[str, Any]], name: str) -> None:
    """Recomputation, overlap and the stage of ZeRO change no step, on one worker and on two."""
    for world in (1, 2):
        assert found[world][name]["seen"] == [
            pytest.approx(values, rel=1e-5) for values in found[world]["ZeRO 1"]["seen"]
        ]


@pytest.mark.parametrize("name", [*VARIANTS, MUON])
def test_one_and_two_workers_take_the_same_steps(
    found: dict[int, dict[str, Any]], shape: ModelConfig, name: str
) -> None:
    """Three micro-batches: two workers need an empty one. Dropout is on: it too follows the micro-batch. Stability is
    measured by one of them, and activations are recomputed or kept: neither changes a step."""
    one, two = found[1][name], found[2][name]
    assert two["seen"] == [pytest.approx(values, rel=1e-4) for values in one["seen"]]
    initial = untrained(shape).state_dict()
    for weight, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][weight], value, rtol=0, atol=2e-5)
        assert not torch.equal(value, initial[weight])


class Watched:
    """A stand-in for DeepSpeed's engine that moves no weights, and keeps the loss of every forward pass."""

    device = torch.device("cpu")

    def __init__(self, module: Transformer) -> None:
        self.module, self.losses = module, list[float]()

    def __call__(self, *given: Any, **named: Any) -> Any:
        found = self.module(*given, **named)
        self.losses.append(found.total.item())
        return found

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None: ...

    def step(self) -> None: ...


def test_dropout_is_another_for_every_micro_batch_and_step_and_the_same_on_any_number_of_workers(
    shape: ModelConfig,
) -> None:
    """One and the same micro-batch six times: the losses differ by what is dropped alone."""
    module = untrained(shape.model_copy(update={"dropout": 0.3})).train()
    image_mask_V = torch.arange(SIZE) >= 40

    def losses(seed: int, step: int, world: int) -> list[float]:
        """Of the micro-batches of a global batch, in its order."""
        found = [0.0] * 6
        for rank in range(world):
            run: Any = Watched(module)
            counts = engine.Counts(10.0 * world, 0.0, 10.0)  # normalizes alike for any number of workers
            group = [replace(rows(0, 1), number=number) for number in range(rank, 6, world)]
            engine.step(run, group, counts, image_mask_V, 0.0, world, (seed, step))
            found[rank::world] = run.losses
        return found

    alone = losses(0, 0, 1)
    assert losses(0, 0, 2) == losses(0, 0, 3) == alone
    assert len({*alone, *losses(0, 1, 1), *losses(1, 0, 1)}) == 18
