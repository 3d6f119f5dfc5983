"""Gradients of many micro-batches of two workers add up in float32 where the weights are bfloat16: beside an addition
in float64."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calumma.model.transformer import Transformer
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine
from calumma.platform.training.steps.held_out import HeldOutBatch

SIZE, MICRO_BATCHES = 50, 64
IMAGE_WEIGHT = 0.25
ROUNDED = 2**-10  # of the error over the gradient: less than one rounding to bfloat16 costs
STAGES = (1, 2, 3)


def rows(number: int) -> HeldOutBatch:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, SIZE, (2, 17), generator=generator)
    return HeldOutBatch(tokens, torch.rand(2, 17, generator=generator) < 0.5, torch.zeros_like(tokens))


def fresh(spec: PretrainSpecification) -> Transformer:
    assert spec.model is not None
    return Transformer(spec.model.model_copy(update={"vocabulary_size": SIZE, "dropout": 0.0})).initialize(0)


def work(rank: int, specs: dict[str, PretrainSpecification], folder: str) -> None:
    """One of two workers: a step of every variant, whose gradients are looked at before the weights move."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    from deepspeed.utils import safe_get_full_grad

    image_mask_V, group = torch.arange(SIZE) >= 40, [rows(number) for number in range(rank, MICRO_BATCHES, 2)]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for variant, spec in specs.items():
        run = engine.initialize(fresh(spec), spec, world=2)
        counts = engine.count_tokens(group, image_mask_V, run.device)

        def accept(sums: torch.Tensor, variant: str = variant, module: Transformer = run.module) -> bool:
            found[variant] = {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
            return True

        engine.step(run, group, counts, image_mask_V, 1e-3, 2, image_weight=spec.image_loss_weight, accept=accept)
    plain = fresh(spec).bfloat16()
    plain.rebuild_rope(torch.device("cpu"))  # it stays in float32
    found["expected"] = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()}
    found["expected, images less"] = {name: torch.zeros_like(sum) for name, sum in found["expected"].items()}
    for batch in map(rows, range(MICRO_BATCHES)):
        for which, weight in (("expected", 1.0), ("expected, images less", IMAGE_WEIGHT)):
            plain.zero_grad()
            settings = {"image_weight": weight, "normalizer": counts.text + weight * counts.image}
            engine.losses(plain, batch, image_mask_V, z_loss=1e-3, **settings).total.backward()
            for name, parameter in plain.named_parameters():
                assert parameter.grad is not None
                found[which][name] += parameter.grad.double()
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def found(
    stage: Callable[..., PretrainSpecification], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("accumulation")
    fields = {"precision": "bfloat16", "micro_batches": MICRO_BATCHES}
    specs = {f"{number}": stage(zero_stage=number, **fields) for number in STAGES}
    specs["rounded"] = stage(zero_stage=2, gradient_reduction="bfloat16", **fields)
    specs["images less"] = stage(zero_stage=2, image_loss_weight=IMAGE_WEIGHT, **fields)
    torch.multiprocessing.spawn(work, (specs, str(folder)), nprocs=2)
    return torch.load(Path(folder, "found.pt"))


@pytest.mark.parametrize("zero_stage", STAGES)
def test_gradients_in_bfloat16_add_up_in_float32(found: dict[str, dict[str, torch.Tensor]], zero_stage: int) -> None:
    """Within a worker, where those of 64 micro-batches would be off by more than a hundredth, and across workers."""
    for name, expected in found["expected"].items():
        assert error(found[f"{zero_stage}"][name], expected) < 1e-6, name


def test_image_tokens_count_by_their_weight(found: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, expected in found["expected, images less"].items():
        assert error(found["images less"][name], expected) < 1e-6, name
        assert error(found["2"][name], expected) > 0.01, name


def test_across_workers_they_are_rounded_where_that_is_asked_for(found: dict[str, dict[str, torch.Tensor]]) -> None:
    assert max(error(found["rounded"][name], expected) for name, expected in found["expected"].items()) > ROUNDED


def error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    return float((gradient.double() - expected).norm() / expected.norm())
