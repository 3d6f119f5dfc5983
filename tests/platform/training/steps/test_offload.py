"""Optimizer state on the host or a disk: what is said where a node cannot do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import cpu_adam
from deepspeed.ops.op_builder import AsyncIOBuilder

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine

SHAPE = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, ffn_width=16, context=16, vocabulary_size=20)
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def on_a_disk(path: str) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/nowhere",
        "mixture": {"tokens": 1.0},
        "output": "stage",
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": 10,
        "micro_batches": 1,
        "offload": {"optimizer": "nvme", "nvme_path": path},
    }
    return PretrainSpecification.model_validate(values)


def test_a_disk_is_refused_where_deepspeed_cannot_write_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(SpecificationError, match=r"`nvme` needs .*async_io.*libaio.*or offload to `cpu`"):
        engine.initialize(Transformer(SHAPE), on_a_disk(str(tmp_path)), 1)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    (tmp_path / "file").touch()
    with pytest.raises(SpecificationError, match=r"nvme_path: .*/file/below cannot be used on this node: Not a dir"):
        engine.initialize(Transformer(SHAPE), on_a_disk(str(tmp_path / "file/below")), 1)


def test_a_host_without_a_compiler_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ninja(self: Any) -> None:
        raise RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed.")

    monkeypatch.setattr(cpu_adam.CPUAdamBuilder, "load", no_ninja)
    with pytest.raises(SpecificationError, match=r"offload\.optimizer: .*ninja not being installed.*g\+\+ and ninja"):
        engine.cpu_adamw([{"params": [torch.nn.Parameter(torch.zeros(3))]}], SETTINGS)


@pytest.mark.slow  # compiles C++ at its first run on a machine: a minute
def test_deepspeeds_adamw_takes_the_steps_of_torchs() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    groups = [[{"params": [weight], "weight_decay": 0.1}] for weight in weights]
    optimizers = [engine.cpu_adamw(groups[0], SETTINGS), torch.optim.AdamW(groups[1], **SETTINGS)]
    for step in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.sin(weight.detach() + step)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    assert float(weights[0][0]) != -1.0
