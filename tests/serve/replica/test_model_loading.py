"""A replica's device and dtype."""

from __future__ import annotations

import torch

from calumma.serve.replica.model_loading import device_and_dtype
from calumma.serve.settings import ModelSettings


def test_a_replica_computes_in_what_suits_its_device_unless_told() -> None:
    cpu, gpu = ModelSettings(model="m"), ModelSettings(model="m", gpus_per_replica=1)
    assert [device_and_dtype(cpu), device_and_dtype(gpu)] == [("cpu", torch.float32), ("cuda", torch.bfloat16)]
    assert device_and_dtype(cpu.model_copy(update={"dtype": "bfloat16"})) == ("cpu", torch.bfloat16)
    assert device_and_dtype(gpu.model_copy(update={"dtype": "int8"})) == ("cuda", torch.bfloat16)
