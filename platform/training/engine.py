"""A Transformer under DeepSpeed: typed settings become its configuration, and one optimizer step its four calls.

Shape suffixes: B rows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calumma.model.loss import Loss
from calumma.model.transformer import Transformer
from calumma.platform.config import Optimizer, TrainSpecification

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Elements of one gradient bucket (DeepSpeed's default); a smaller model gets a buffer of its own size.
_BUCKET = 500_000_000


class Batch(Protocol):
    """One micro-batch, a row longer than the context by the last target; padding has segment -1, never trained."""

    @property
    def tokens(self) -> Tensor: ...  # LongTensor [B, T+1]

    @property
    def mask(self) -> Tensor: ...  # BoolTensor [B, T+1], true where the token is a trained target

    @property
    def segments(self) -> Tensor: ...  # LongTensor [B, T+1]


class Counts(NamedTuple):
    """Trained text and image tokens, and all tokens but padding, of a global batch."""

    text: float
    image: float
    tokens: float

    @property
    def trained(self) -> float:
        return self.text + self.image


def settings(spec: TrainSpecification, world: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` workers and a model of so many parameters; `spec.deepspeed` has the last
    word."""
    accumulation = micro_batches_a_worker(spec, world)
    bfloat16 = spec.precision == "bfloat16"
    bucket = min(_BUCKET, max(parameters, 1))
    ours: dict[str, Any] = {
        # DeepSpeed only multiplies these: what a micro-batch holds is the shards' business
        "train_batch_size": accumulation * world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": spec.optimizer.gradient_clip,
        "bf16": {"enabled": bfloat16},
        "zero_optimization": {
            "stage": spec.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "checkpoint": {"tag_validation": "Ignore"},
    }
    if bfloat16:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(ours, spec.deepspeed)


def micro_batches_a_worker(spec: TrainSpecification, world: int) -> int:
    """Micro-batches each worker runs a step; the short ones add empty ones."""
    return -(-spec.micro_batches // world)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms do not, since pulling a scale to 0 does not regularize."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = [p for name, p in named if p.dim() < 2 or "norm" in name]
    matrices = [p for name, p in named if not (p.dim() < 2 or "norm" in name)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def initialize(model: Transformer, spec: TrainSpecification, world: int) -> DeepSpeedEngine:
    """The model under DeepSpeed's ZeRO, with torch's AdamW. torch.distributed must be up."""
    import deepspeed

    if deepspeed.get_accelerator().device_name() == "cpu":
        # Its shared-memory collectives are compiled with g++ at the first start, for minutes; gloo does it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = sum(p.numel() for p in model.parameters())
    configuration = settings(spec, world, parameters)
    optimizer = None if "optimizer" in configuration else _adamw(model, spec.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration, dist_init_required=False)
    engine.module.rebuild_rope(engine.device)  # DeepSpeed has rounded it to bfloat16 with the weights
    return engine


def count(group: list[Any], image_mask_V: Tensor, device: torch.device) -> Counts:
    """What all workers together train on in this step: one all_reduce, before any backward pass."""
    local = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in group:
        targets, mask = batch.tokens[:, 1:].to(device), batch.mask[:, 1:].to(device)
        image = (image_mask_V[targets] & mask).sum()
        local += torch.stack([mask.sum() - image, image, (batch.segments[:, 1:].to(device) >= 0).sum()])
    return Counts(*everywhere(local).tolist())


def step(
    engine: DeepSpeedEngine,
    group: list[Any],
    counts: Counts,
    image_mask_V: Tensor,
    z_loss: float,
    world: int,
    dropout: tuple[int, int, int] | None = None,
    measure: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward, backward and one optimizer step over this worker's micro-batches of a global batch.

    The loss is the sum over all workers' trained tokens divided by their global count, so any number of workers takes
    the same step. `dropout`, (seed, step, rank), makes that true of dropped activations too: each micro-batch is seeded
    by its number in the global batch.
    Returns this worker's float64 Tensor [3]: summed text and image losses (nats) and log(Z)^2; and, with `measure`, the
    stability instruments of its first micro-batch (model/stability.py).
    """
    local = torch.zeros(3, dtype=torch.float64, device=engine.device)
    stability: dict[str, Tensor] = {}
    # DeepSpeed averages gradients over the workers, where the sum is what the global count divides.
    normalizer = max(counts.trained, 1.0) / world
    for turn, batch in enumerate(group):
        if dropout is not None:
            seed, number, rank = dropout
            torch.manual_seed(hash((seed, number, turn * world + rank)) % 2**63)
        found = losses(engine, batch, image_mask_V, z_loss=z_loss, normalizer=normalizer, measure=measure and turn == 0)
        engine.backward(found.total, scale_wrt_gas=False)
        engine.step()  # moves the weights after the last micro-batch of the step only
        local += torch.stack([found.sums.text_nll, found.sums.image_nll, found.sums.z_sum]).double()
        stability |= found.stability
    return local, stability


def losses(engine: Any, batch: Any, image_mask_V: Tensor, **settings: Any) -> Loss:
    """Forward pass over one micro-batch; an empty one costs two tokens and weighs nothing. `settings`: z_loss,
    normalizer and measure of `Transformer.forward`."""
    device = engine.device
    tokens, mask, segments = batch.tokens, batch.mask, batch.segments
    if not tokens.shape[0]:
        tokens = torch.zeros(1, 3, dtype=torch.long)
        mask, segments = torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    tokens, mask, segments = tokens.to(device), mask.to(device), segments.to(device)
    return engine(
        tokens[:, :-1],
        segments[:, :-1],
        targets=tokens[:, 1:],
        mask=mask[:, 1:],
        image_mask=image_mask_V,
        **settings,
    )


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gathered_weights(engine: DeepSpeedEngine, keep: bool) -> dict[str, Tensor]:
    """All weights on the CPU, where `keep` (elsewhere nothing); every worker must call it, ZeRO 3 gathers here."""
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def everywhere(local: Tensor) -> Tensor:
    """The sum over all workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(local)
    return local


def _adamw(model: nn.Module, optimizer: Optimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
