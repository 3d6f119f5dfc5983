"""Settings of a training that its GPUs have memory for, by the forecast of `calumma plan`: the fastest that fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from calumma.model.config import ModelConfig
from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import FinetuneSpecification


def fitted(
    spec: FinetuneSpecification, config: ModelConfig, micro_batch: int, kind: str, gpus: int, memory: float | None
) -> FinetuneSpecification:
    """The specification with what makes it fit a machine of so many GPUs of a kind that model/devices.py knows.
    micro_batch: rows of a row group. memory: bytes of the machine's own, where they are known. Raises
    SpecificationError where nothing makes it fit."""
    from calumma.platform.training.forecast.forecast import Training, forecast
    from calumma.platform.training.forecast.machines import parse_nodes

    machines = parse_nodes(f"{gpus}x{kind}")
    if memory is not None:
        machines = replace(machines, machine=replace(machines.machine, memory=memory))
    training = Training(spec, config, micro_batch)
    for change in _changes(rows=2 if spec.preference else 1):
        changed = training.changed(**change)
        if (answer := forecast(changed, machines)).fits:
            assert isinstance(changed.spec, FinetuneSpecification)
            return changed.spec
    problems = "; ".join(map(str, answer.problems))
    advice = "; low-rank adapters (--lora 16) take far less, on weights of 4 bits (--quantize 4) less again"
    if spec.lora:
        advice = "" if spec.lora.quantize else "; frozen weights in 4 bits (--quantize 4) take less"
    raise SpecificationError(f"this machine's {machines.machine.name} cannot train the model: {problems}{advice}")


def _changes(rows: int) -> tuple[dict[str, Any], ...]:
    """The fastest first."""
    small: dict[str, Any] = {"checkpoint_activations": True, "rows_per_pass": rows}
    return (
        {"checkpoint_activations": False},
        {"checkpoint_activations": True},
        {"checkpoint_activations": True, "zero_stage": 2},
        small,
        small | {"zero_stage": 2},
        {"checkpoint_activations": True, "zero_stage": 3},
        small | {"zero_stage": 3},
        small | {"zero_stage": 2, "offload": {"optimizer": "cpu"}},
        small | {"zero_stage": 3, "offload": {"optimizer": "cpu"}},
    )
