"""Gradients of many micro-batches add up in float32 where the weights are bfloat16: beside an addition in float64."""

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
# What one rounding to bfloat16 costs, of 8 bits: DeepSpeed's ZeRO 1 sends the sum from worker to worker in it.
ROUNDED = 2**-8
LIMITS = {1: ROUNDED, 2: 1e-6, 3: 1e-6}  # of the error over the gradient, by stage of ZeRO


def rows(number: int) -> HeldOutBatch:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, SIZE, (2, 17), generator=generator)
    return HeldOutBatch(tokens, torch.rand(2, 17, generator=generator) < 0.5, torch.zeros_like(tokens))


def fresh(spec: PretrainSpecification) -> Transformer:
    assert spec.model is not None
    return Transformer(spec.model.model_copy(update={"vocabulary_size": SIZE, "dropout": 0.0})).initialize(0)


def work(rank: int, specs: dict[int, PretrainSpecification], folder: str) -> None:
    """One worker: a step at every stage, whose gradients are looked at before the weights move."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    from deepspeed.utils import safe_get_full_grad

    image_mask_V, group = torch.arange(SIZE) >= 40, [rows(number) for number in range(MICRO_BATCHES)]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for stage, spec in specs.items():
        run = engine.initialize(fresh(spec), spec, world=1)
        counts = engine.count_tokens(group, image_mask_V, run.device)

        def accept(sums: torch.Tensor, stage: int = stage, module: Transformer = run.module) -> bool:
            found[f"{stage}"] = {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
            return True

        engine.step(run, group, counts, image_mask_V, 1e-3, 1, accept=accept)
    plain = fresh(spec).bfloat16()
    plain.rebuild_rope(torch.device("cpu"))  # it stays in float32
    found["expected"] = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()}
    for batch in group:
        plain.zero_grad()
        engine.losses(plain, batch, image_mask_V, z_loss=1e-3, normalizer=counts.trained).total.backward()
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            found["expected"][name] += parameter.grad.double()
    torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def found(
    stage: Callable[..., PretrainSpecification], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("accumulation")
    fields = {"precision": "bfloat16", "micro_batches": MICRO_BATCHES, "resources": {"workers": 1}}
    specs = {number: stage(zero_stage=number, **fields) for number in LIMITS}
    torch.multiprocessing.spawn(work, (specs, str(folder)), nprocs=1)
    return torch.load(Path(folder, "found.pt"))


@pytest.mark.parametrize("zero_stage", LIMITS)
def test_gradients_in_bfloat16_add_up_in_float32(found: dict[str, dict[str, torch.Tensor]], zero_stage: int) -> None:
    """Added up in bfloat16, those of 64 micro-batches are off by more than a hundredth."""
    for name, expected in found["expected"].items():
        error = (found[f"{zero_stage}"][name].double() - expected).norm() / expected.norm()
        assert error < LIMITS[zero_stage], name
