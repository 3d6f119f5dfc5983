"""Bytes of a GPU, of a host and of its disk that a training needs, by what they are for.

The states of ZeRO's stages are those that DeepSpeed 0.19 keeps, with which its own estimators agree
(`estimate_zero2_model_states_mem_needs`, and ZeRO 3's): in bfloat16 a trained parameter has 2 bytes, a float32 master
of 4, two moments of 8, and a gradient that passes add up in 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calumma.model.config import ModelConfig
from calumma.platform.streaming.division import Division
from calumma.platform.training.checkpoints.node_local import KEPT
from calumma.platform.training.forecast import shape
from calumma.platform.training.forecast.shape import Sizes
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.standby.segment import SLOTS

# What a GPU's memory holds beside tensors: CUDA's context and kernels, NCCL's buffers, and what the allocator cannot
# join. A GPU's memory as CUDA tells it is some percent above its name's: the two are taken to cancel.
RUNTIME = 2e9
FRAGMENTS = 0.03  # of everything else
CHUNK_BYTES = 256 << 20  # of logits, model/ops/loss.py
_LIVE = 1_000_000_000  # parameters that ZeRO 3 keeps gathered, `stage3_max_live_parameters`
_PREFETCH = 50_000_000  # and that it gathers ahead, `stage3_prefetch_bucket_size`
_SUB_GROUP = 1_000_000_000  # elements that ZeRO 3 steps at a time, `sub_group_size`
_SPARE = 1e9  # of a process that has only imported everything
_PROCESS = 4e9  # bytes of a worker's process: libraries, page-locked buffers, the batches read ahead


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, or of one worker where there are no GPUs."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    """Buckets of collectives, gathered weights, the loss, what the runtime takes."""

    @property
    def total(self) -> float:
        return (self.weights + self.gradients + self.optimizer + self.activations + self.buffers) + FRAGMENTS * (
            self.weights + self.gradients + self.optimizer + self.activations
        )

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer


def pass_rows(division: Division, world: int) -> int:
    """Sequences of the largest pass of a worker."""
    return max(division.pass_rows(0, division.most(world), world))


def activations(spec: TrainSpecification, config: ModelConfig, rows: int) -> float:
    """Bytes that a worker keeps between the forward and the backward pass of so many sequences."""
    element, tokens = _element(spec), rows * config.context / spec.sequence_parallel
    block, backward = shape.block_bytes(config, element), shape.backward_bytes(config, element)
    if spec.sequence_parallel > 1:
        block += shape.shared_bytes(config, element)
    if not spec.checkpoint_activations:
        return tokens * (config.layers * block + backward)
    if selective(spec):  # the block that is computed again makes anew all but what is kept of it
        return tokens * ((config.layers - 1) * shape.product_bytes(config, element) + block + backward)
    return tokens * (config.layers * shape.input_bytes(config, element) + block + backward)


def selective(spec: TrainSpecification) -> bool:
    """Whether recomputation keeps the results of matrix products."""
    return str(spec.checkpoint_activations) == "selective"


def wire_bytes(settings: dict[str, Any], element: int) -> int:
    """Of an element of a gradient that crosses workers."""
    kinds = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2}
    return kinds.get(str(settings.get("communication_data_type")), element)


def gpu_memory(
    spec: TrainSpecification, config: ModelConfig, settings: dict[str, Any], world: int, rows: int
) -> Memory:
    """Of each of `world` workers whose passes have so many rows; `settings`: `deepspeed_settings.deepspeed_config`."""
    sizes, element, zero = Sizes.of(config, spec), _element(spec), settings["zero_optimization"]
    stage = spec.zero_stage
    model, trained = sizes.total + sizes.added, sizes.trained

    def divided(elements: float, from_stage: int) -> float:
        return elements / world if stage >= from_stage else elements

    master, moments = 4 * divided(trained, 1), 8 * divided(trained, 1)
    if element == 4 and stage == 0:
        master = 0  # the weights are their own
    weights = element * divided(model - sizes.quantized, 3)
    gradients = (4 if stage else element) * divided(trained, 2)
    elements, wire = min(zero["reduce_bucket_size"], trained), wire_bytes(settings, element)
    bucket = elements * (element * (2 if zero.get("overlap_comm") else 1) + (wire if wire != element else 0))
    divisible = sizes.total - sizes.quantized
    gathered = element * (min(divisible, _LIVE + sizes.largest) + _PREFETCH) if stage == 3 and world > 1 else 0
    # The optimizer steps on float32 gradients that it joins, when nothing of the passes is left.
    stepped = 4 * min(divided(trained, 1), _SUB_GROUP if stage == 3 else divided(trained, 1))
    on_gpu = master + moments
    if spec.offload.optimizer != "none":
        on_gpu, stepped, gradients = 0, 0, gradients if stage < 2 else 0
    if spec.offload.weights != "none":
        weights = 0
    if spec.lora is not None and spec.lora.quantize is not None:
        weights += shape.quantized_bytes(config, spec.lora.quantize, element, sizes.quantized)
        gathered += shape.dequantizing_bytes(config, spec.lora.quantize, element)
    tokens = -(-rows * config.context // spec.sequence_parallel)
    passes = activations(spec, config, rows)
    loss = shape.loss_bytes(config, element, tokens, CHUNK_BYTES)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=on_gpu,
        activations=max(passes, stepped - loss),
        buffers=bucket + gathered + loss + RUNTIME,
    )


def host_memory(
    spec: TrainSpecification, config: ModelConfig, settings: dict[str, Any], world: int, local: int
) -> float:
    """Bytes of a host with `local` workers of `world`, when the first of them publishes."""
    sizes, element = Sizes.of(config, spec), _element(spec)
    held = 0.0
    if spec.offload.optimizer == "cpu":
        held += 16 * sizes.trained * local / world
    if spec.offload.weights == "cpu":
        held += element * (sizes.total + sizes.added) * local / world
    published = (2 * element + 4) * sizes.total  # the first worker gathers the weights, and saves them as a model
    on_cpu = 0.0
    recovery = spec.resources.recovery
    if recovery.copy_every is not None:  # master and moments in two slots, on the own host and on another
        held += 12 * SLOTS * sizes.trained * local / world * (2 if local < world else 1)
    if recovery.spares and not spec.resources.gpus_per_worker:
        held += _SPARE
    if not spec.resources.gpus_per_worker:
        on_cpu = gpu_memory(spec, config, settings, world, 1).total * local
    return _PROCESS * local + held + on_cpu + published


def host_disk(spec: TrainSpecification, config: ModelConfig, world: int, local: int) -> float:
    """Bytes that `recovery.node_local` takes of the own disk of a host with `local` workers of `world`: their parts of
    the checkpoints that are kept, and of the one that is being written."""
    if spec.resources.recovery.node_local is None:
        return 0.0
    return (KEPT + 1) * 12 * Sizes.of(config, spec).trained * local / world


def _element(spec: TrainSpecification) -> int:
    return 4 if spec.precision == "float32" else 2
