"""A Transformer under DeepSpeed: one optimizer step is its four calls.

Shape suffixes: B rows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calumma.model.ops.loss import Loss
from calumma.model.transformer import Transformer
from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.steps import muon, sequence
from calumma.platform.training.steps.deepspeed_settings import deepspeed_config
from calumma.platform.training.trainable import quantized

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)


class Batch(Protocol):
    """One micro-batch, a row longer than the context by the last target; padding has segment -1, never trained."""

    @property
    def tokens(self) -> Tensor: ...  # LongTensor [B, T+1]

    @property
    def mask(self) -> Tensor: ...  # BoolTensor [B, T+1], true where the token is a trained target

    @property
    def segments(self) -> Tensor: ...  # LongTensor [B, T+1]

    @property
    def number(self) -> int: ...  # its number among those of the global batch


class Counts(NamedTuple):
    """Trained text and image tokens, and all tokens but padding, of a global batch."""

    text: float
    image: float
    tokens: float

    @property
    def trained(self) -> float:
        return self.text + self.image


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms do not, since pulling a scale to 0 does not regularize."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    norms = [p for name, p in named if _is_vector(name, p)]
    matrices = [p for name, p in named if not _is_vector(name, p)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # what ZeRO 3 has cut up has no shape of its own
    return len(shape) < 2 or "norm" in name


def partition(module: nn.Module, configuration: dict[str, Any], dtype: torch.dtype) -> None:
    """Cut a module's parameters up, in place, as ZeRO 3 does: each worker keeps its part."""
    import deepspeed

    _use_gloo()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    deepspeed.zero.Init(module=module, config_dict_or_path=configuration, dtype=dtype)


def _use_gloo() -> None:
    import deepspeed

    if deepspeed.get_accelerator().device_name() == "cpu":
        # Its shared-memory collectives are compiled with g++ at the first start, for minutes; gloo does it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize(model: Transformer, spec: TrainSpecification, world: int, passes: int | None = None) -> DeepSpeedEngine:
    """The model under DeepSpeed's ZeRO, with torch's AdamW or with Muon; `passes` as in `deepspeed_config`.
    torch.distributed must be up."""
    import deepspeed

    _use_gloo()
    if "nvme" in (spec.offload.optimizer, spec.offload.weights):
        _require_nvme(spec)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    configuration = deepspeed_config(spec, world, parameters, passes)
    optimizer = None if "optimizer" in configuration else _optimizer(model, spec)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration, dist_init_required=False)
    sequence.share_rows(model, spec.sequence_parallel, timedelta(seconds=spec.resources.recovery.collective_seconds))
    engine.module.rebuild_rope(engine.device)  # DeepSpeed has rounded it to bfloat16 with the weights
    if engine.optimizer is engine.basic_optimizer:
        engine.clip_fp32_gradients = lambda: _clip_gradients(engine)
    return engine


def count_tokens(group: list[Any], image_mask_V: Tensor, device: torch.device, sharing: int = 1) -> Counts:
    """What all workers together train on in this step: one all_reduce, before any backward pass. `sharing`: workers
    that were given the same rows."""
    local = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in group:
        targets, mask = batch.tokens[:, 1:].to(device), batch.mask[:, 1:].to(device)
        image = (image_mask_V[targets] & mask).sum()
        local += torch.stack([mask.sum() - image, image, (batch.segments[:, 1:].to(device) >= 0).sum()])
    return Counts(*(sum_over_workers(local) / sharing).tolist())


def step(
    engine: DeepSpeedEngine,
    group: list[Any],
    counts: Counts,
    image_mask_V: Tensor,
    z_loss: float,
    world: int,
    dropout: tuple[int, int] | None = None,
    image_weight: float = 1.0,
    measure: bool = False,
    accept: Callable[[Tensor], bool] | None = None,
    losses_of: Callable[..., Loss] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward, backward and one optimizer step over this worker's micro-batches of a global batch.

    The loss is the sum over all workers' trained tokens, image tokens by their weight, divided by their global count,
    so any number of workers takes the same step. `dropout`, (seed, step), makes that true of dropped activations too:
    each micro-batch is seeded by its number in the global batch (and, where workers share rows, by that of the part).
    `accept` is given the sums over all workers before the weights move; when it returns False, weights and optimizer
    stay as they are. They do so as well when the gradient is not finite.
    `losses_of`: what is minimized, in place of `losses`.
    Returns this worker's float64 Tensor [3]: summed text and image losses (nats) and log(Z)^2; and, with `measure`, the
    stability instruments of its first micro-batch (model/ops/stability.py).
    """
    local = torch.zeros(3, dtype=torch.float64, device=engine.device)
    stability: dict[str, Tensor] = {}
    # DeepSpeed averages gradients over the workers, where the sum is what the global count divides.
    normalizer = (counts.text + image_weight * counts.image or 1.0) / world
    for turn, batch in enumerate(group):
        if dropout is not None:
            part = () if engine.module.shared is None else (engine.module.shared.number,)
            torch.manual_seed(hash((*dropout, batch.number, *part)) % 2**63)
        settings = {"z_loss": z_loss, "normalizer": normalizer, "image_weight": image_weight}
        settings["measure"] = measure and turn == 0
        loss = (losses_of or losses)(engine, batch, image_mask_V, **settings)
        # A copy: handed the forward pass's own result, DeepSpeed divides the gradient by the number of micro-batches
        # after all, without ZeRO and at stage 1 in bfloat16 (0.19.8: where it does not scale the loss itself, its hooks
        # on the result run before the one that marks the loss as scaled).
        engine.backward(loss.total.clone(), scale_wrt_gas=False)
        local += torch.stack([loss.sums.text_nll, loss.sums.image_nll, loss.sums.z_sum]).double()
        stability |= loss.stability
        if accept is not None and turn == len(group) - 1 and not accept(sum_over_workers(local.clone())):
            with _without_update(engine):
                engine.step()
        else:
            engine.step()  # moves the weights after the last micro-batch of the step only
    return local, stability


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Over all workers, before clipping, of the newest step; infinite or NaN when the gradient was, and not applied."""
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else float(norm)


@contextmanager
def _without_update(engine: DeepSpeedEngine) -> Iterator[None]:
    """Within it a step ends as always, gradients cleared and counters raised, but for the optimizer's own step: every
    ZeRO stage calls that of the optimizer it wraps."""
    optimizer = engine.basic_optimizer
    optimizer.step = lambda *given, **named: None
    try:
        yield
    finally:
        del optimizer.step


def _clip_gradients(engine: DeepSpeedEngine) -> None:
    """Without ZeRO and in float32 DeepSpeed neither keeps the gradient's norm nor refuses one that is not finite."""
    from deepspeed.runtime.utils import clip_grad_norm_

    norm = clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping(), mpu=engine.mpu)
    engine._global_grad_norm = float(norm)
    if not math.isfinite(engine._global_grad_norm):
        engine.module.zero_grad(set_to_none=True)  # the optimizer passes over weights without gradient


def losses(model: Any, batch: Batch, image_mask_V: Tensor, **settings: Any) -> Loss:
    """Forward pass of a Transformer, under DeepSpeed or not, on the mask's device over one micro-batch; an empty one
    costs two tokens, or one for each worker that shares it, and weighs nothing. `settings`: z_loss, normalizer,
    image_weight and measure of `Transformer.forward`."""
    device = image_mask_V.device
    tokens, mask, segments = batch.tokens, batch.mask, batch.segments
    if not tokens.shape[0]:
        length = 3 if model.shared is None else model.shared.size + 1
        tokens, segments = torch.zeros(2, 1, length, dtype=torch.long)
        mask = torch.zeros(1, length, dtype=torch.bool)
    tokens, mask, segments = tokens.to(device), mask.to(device), segments.to(device)
    found: Loss = model(
        tokens[:, :-1],
        segments[:, :-1],
        targets=tokens[:, 1:],
        mask=mask[:, 1:],
        image_mask=image_mask_V,
        **settings,
    )
    return found


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def release(engine: DeepSpeedEngine) -> None:
    """Let an engine go that is not used any more: DeepSpeed's hooks of ZeRO 1 and 2 would keep its weights and their
    optimizer's state in a process that goes on to train another. Those of ZeRO 3 keep it all the same (0.19.8). On GPUs
    a process trains once, and letting go would wait for whatever is under way: nothing is done there. Raises nothing.
    """
    if engine.device.type != "cpu":
        return
    try:
        engine.destroy()
    except Exception:
        logger.warning("an engine that is not used any more could not be let go", exc_info=True)


def gathered_weights(
    engine: DeepSpeedEngine, keep: bool, beat: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """All weights on the CPU, where `keep` (elsewhere nothing); every worker must call it, ZeRO 3 gathers here. `beat`
    is called after each. Quantized ones are those that the model computes with."""
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True)
        beat()
    for name, weight in quantized.weights_of(engine.module).items() if keep else ():
        weights[name] = weight.dequantized(next(iter(weights.values())).dtype).cpu()
        beat()
    return weights


def sum_over_workers(local: Tensor) -> Tensor:
    """The sum over all workers."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(local)
    return local


def _optimizer(model: nn.Module, spec: TrainSpecification) -> torch.optim.Optimizer:
    """Muon or AdamW; DeepSpeed's own AdamW where the state of a GPU's weights is kept on its host, several times as
    fast there."""
    import deepspeed

    optimizer = spec.optimizer
    settings: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": (optimizer.beta1, optimizer.beta2),
        "eps": optimizer.eps,
    }
    groups = parameter_groups(model, optimizer.weight_decay)
    if spec.offload.optimizer != "none" and deepspeed.get_accelerator().device_name() != "cpu":
        return cpu_adamw(groups, settings)
    if optimizer.kind == "muon":
        return muon.Muon(muon.groups(model, groups, optimizer.momentum), **settings)
    return torch.optim.AdamW(groups, **settings)


def cpu_adamw(groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW in C++. Raises SpecificationError where it cannot be compiled."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except (RuntimeError, ImportError, OSError) as error:
        raise SpecificationError(
            "offload.optimizer: DeepSpeed compiles its AdamW for the CPU when a node first needs it, which failed on "
            f"{socket.gethostname()} ({error.__cause__ or error}); it takes g++ and ninja (say `apt install g++ "
            "ninja-build`), `ds_report` tells more; or leave the optimizer's state on the GPU (`none`)"
        ) from error


def _require_nvme(spec: TrainSpecification) -> None:
    """Raises SpecificationError where DeepSpeed cannot use a local disk."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    path = Path(str(spec.offload.nvme_path))
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise SpecificationError(
            "offload: `nvme` needs DeepSpeed's async_io operator, which does not build on this node: install libaio "
            "(say `apt install libaio-dev`), or offload to `cpu`; `ds_report` tells more"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecificationError(f"offload.nvme_path: {path} cannot be used on this node: {error.strerror}") from error
