"""DeepSpeed's configuration, made of typed settings, and what it says of those that are passed on to it as they are."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from pydantic import ValidationError

from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import TrainSpecification

# Elements of one gradient bucket (DeepSpeed's default); a smaller model gets a buffer of its own size.
_BUCKET_ELEMENTS = 500_000_000

# Settings that our own specification decides, with the field that does.
_OWN_FIELDS = {
    "train_batch_size": "micro_batches",
    "train_micro_batch_size_per_gpu": "micro_batches",
    "gradient_accumulation_steps": "micro_batches",
    "scheduler": "schedule",
    "zero_optimization.stage": "zero_stage",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "communication_data_type": "gradient_reduction",
    "sequence_parallel_size": "sequence_parallel",
    "data_parallel_size": "sequence_parallel",
}


def deepspeed_config(
    spec: TrainSpecification, world: int, parameters: int, passes: int | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` workers and a model of so many parameters; `spec.deepspeed` has the last
    word. `passes`: forward passes of each worker a step; none: a pass a micro-batch.
    https://www.deepspeed.ai/docs/config-json/"""
    accumulation = passes or micro_batches_a_worker(spec, world)
    bfloat16 = spec.precision == "bfloat16"
    bucket = min(_BUCKET_ELEMENTS, max(parameters, 1))
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": spec.overlapped,
    }
    if not torch.cuda.is_available():
        # gloo moves half as much when it reduces each part to the worker that keeps it (benchmarks/RESULTS.md)
        zero["use_multi_rank_bucket_allreduce"] = False
    for name, device in (("offload_optimizer", spec.offload.optimizer), ("offload_param", spec.offload.weights)):
        if device != "none":
            zero[name] = {"device": device, "pin_memory": spec.offload.pin_memory}
            if device == "nvme":
                zero[name]["nvme_path"] = spec.offload.nvme_path
    configuration: dict[str, Any] = {
        # DeepSpeed only multiplies these: what a pass holds is the plan's business
        "train_batch_size": accumulation * world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.optimizer.gradient_clip,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "checkpoint": {"tag_validation": "Ignore"},
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[spec.gradient_reduction],
    }
    if bfloat16:
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(configuration, spec.deepspeed)


def check_deepspeed_settings(spec: TrainSpecification) -> None:
    """Let DeepSpeed's own configuration class judge the raw `deepspeed` settings. Raises SpecificationError."""
    if not spec.deepspeed:
        return
    for path, field in _OWN_FIELDS.items():
        section, _, name = path.rpartition(".")
        settings = spec.deepspeed.get(section, {}) if section else spec.deepspeed
        if isinstance(settings, dict) and name in settings:
            raise SpecificationError(f"deepspeed.{path}: this is decided by `{field}`; leave it away here and set that")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    recording = _RecordingConfig(deepspeed_config(spec, world=1, parameters=1))
    try:
        DeepSpeedConfig(recording)
    except Exception as error:  # pydantic's, assertions, its own: it has no common class
        raise SpecificationError(f"deepspeed: DeepSpeed refuses these settings: {_error_text(error)}") from error
    for name in spec.deepspeed.keys() - recording.names:
        near = difflib.get_close_matches(name, recording.names, n=1)
        meant = f"; is {near[0]} meant?" if near else "; https://www.deepspeed.ai/docs/config-json/ lists them"
        raise SpecificationError(f"deepspeed.{name}: DeepSpeed knows no such setting{meant}")


class _RecordingConfig(dict[str, Any]):
    """A configuration that remembers which settings were looked for: DeepSpeed passes over names it does not know."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __copy__(self) -> _RecordingConfig:
        return self

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def _error_text(error: Exception) -> str:
    """One line for each wrong field of a pydantic error, else the message."""
    if not isinstance(error, ValidationError):
        return str(error) or type(error).__name__
    return "; ".join(
        f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']} (given {e.get('input')!r})" for e in error.errors()
    )


def micro_batches_a_worker(spec: TrainSpecification, world: int) -> int:
    """Micro-batches each worker runs a step; the short ones add empty ones."""
    return -(-spec.micro_batches * spec.sequence_parallel // world)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
