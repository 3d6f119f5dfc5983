"""Cross-entropy and z-loss as sums and counts by modality, so that any number of workers normalizes them globally.

z-loss is log(Z)^2, Z the output softmax's partition function; it bounds the growth of the logits (paper section 2.3).
`sums` is the plain formula. `linear_loss` is the same from the states before the output projection: it holds a chunk of
the logits at a time and has the gradients ready when the forward pass ends, so the logits are computed once and
never stored (after Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009).

Shape suffixes: B batch, T tokens, R trained tokens, C tokens of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Bytes of one chunk's logits. On the CPU, 1,024 rows of a 65,536 vocabulary in bfloat16: fewer rows and AMX waits for
# the weight to be read (256 rows ran at 60 % of the speed), more and the memory is what this was written to save.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
# Elements the softmax works on at a time on the CPU: small enough to stay in the cache over its passes.
TILE = 1 << 19
# Rows of the weight whose gradient is accumulated at a time in float32, for the same reason.
WEIGHT_TILE = 4096


class LossSums(NamedTuple):
    """0-dim float32 tensors over the trained tokens of a micro-batch."""

    text_nll: Tensor
    text_count: Tensor
    image_nll: Tensor
    image_count: Tensor
    z_sum: Tensor


class Loss(NamedTuple):
    """`total` is what is minimized, 0-dim and differentiable: (sum of nll + z_loss x z_sum) / normalizer, image tokens
    by their weight. `sums` are without gradient and weight. `stability`: see stability.py; empty unless asked for."""

    total: Tensor
    sums: LossSums
    stability: dict[str, Tensor]


def sums(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor, image_mask_V: Tensor) -> LossSums:
    """Negative log-likelihoods (nats) of `targets_BT` where `mask_BT`, split by whether the target is an image code.

    logits FloatTensor [B, T, V]; targets LongTensor [B, T]; mask BoolTensor [B, T]; image_mask BoolTensor [V].
    """
    log_z_BT = torch.logsumexp(logits_BTV, dim=-1)
    nll_BT = log_z_BT - logits_BTV.gather(-1, targets_BT[..., None])[..., 0]
    return _by_modality(nll_BT, log_z_BT, image_mask_V[targets_BT], mask_BT)


def trained_rows(mask_BT: Tensor) -> Tensor:
    """LongTensor [R]: which of the B*T tokens are trained. The host waits for the device here: call it before the
    forward pass is queued, not after."""
    return mask_BT.flatten().nonzero()[:, 0]


def linear_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    rows_R: Tensor,
    image_mask_V: Tensor,
    *,
    z_loss: float = 0.0,
    normalizer: float = 1.0,
    image_weight: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, LossSums]:
    """The total loss and the sums of the logits `hidden @ weight.T`, over the tokens `rows_R` of B*T (`trained_rows`).

    hidden FloatTensor [B, T, D] and weight FloatTensor [V, D] of one dtype, float32 or bfloat16; targets LongTensor
    [B, T]; image_mask BoolTensor [V]. `image_weight`: what an image token counts in the total, a text token counts 1.
    `chunk`: tokens whose logits are held at once. Sums, softmax and the accumulation
    over chunks are float32. The gradients are those of `total` alone, and can be asked for once.
    """
    B, T, D = hidden_BTD.shape
    V = weight_VD.shape[0]
    if chunk is None:
        budget = CHUNK_BYTES.get(hidden_BTD.device.type, CHUNK_BYTES["cuda"])
        chunk = max(1, budget // (V * weight_VD.element_size()))
    x_RD, targets_R = hidden_BTD.reshape(B * T, D), targets_BT.flatten()
    if len(rows_R) < B * T:
        x_RD, targets_R = x_RD[rows_R], targets_R[rows_R]
    differentiate = torch.is_grad_enabled() and (x_RD.requires_grad or weight_VD.requires_grad)
    image_R = image_mask_V[targets_R]
    counted_R = None if image_weight == 1 else torch.where(image_R, image_weight, 1.0)
    total, nll_R, log_z_R = _LinearLoss.apply(
        x_RD.to(weight_VD.dtype), weight_VD, targets_R, counted_R, z_loss, normalizer, chunk, differentiate
    )
    return total, _by_modality(nll_R, log_z_R, image_R, torch.ones_like(image_R))


def linear_logprobs(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, rows_R: Tensor, chunk: int | None = None
) -> Tensor:
    """FloatTensor [R]: log-probabilities of the targets of the tokens `rows_R`, by the logits `hidden @ weight.T`;
    differentiable, for losses that are no sum over tokens. As `linear_loss` it holds a chunk of the logits at a time,
    and computes them again in the backward pass."""
    B, T, D = hidden_BTD.shape
    x_RD = hidden_BTD.reshape(B * T, D)[rows_R].to(weight_VD.dtype)
    targets_R = targets_BT.flatten()[rows_R]
    if chunk is None:
        budget = CHUNK_BYTES.get(hidden_BTD.device.type, CHUNK_BYTES["cuda"])
        chunk = max(1, budget // (len(weight_VD) * torch.float32.itemsize))
    parts = [
        checkpoint(
            _logprobs, x_RD[begin : begin + chunk], weight_VD, targets_R[begin : begin + chunk], use_reentrant=False
        )
        for begin in range(0, len(rows_R), chunk)
    ]
    return torch.cat(parts) if parts else x_RD.float().sum(-1)


def _logprobs(x_CD: Tensor, weight_VD: Tensor, targets_C: Tensor) -> Tensor:
    logits_CV = F.linear(x_CD, weight_VD).float()
    return logits_CV.gather(-1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(-1)


def _by_modality(nll: Tensor, log_z: Tensor, image: Tensor, mask: Tensor) -> LossSums:
    image = image & mask
    text = mask & ~image
    return LossSums(
        text_nll=(nll * text).sum(),
        text_count=text.sum().float(),
        image_nll=(nll * image).sum(),
        image_count=image.sum().float(),
        z_sum=(log_z.square() * mask).sum(),
    )


class _LinearLoss(torch.autograd.Function):
    """(x [R, D], weight [V, D], targets [R], what each counts [R]; None: 1) -> total, nll [R], log_z [R]; the gradients
    are made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_VD: Tensor,
        targets_R: Tensor,
        counted_R: Tensor | None,
        z_loss: float,
        normalizer: float,
        chunk: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        R, V = len(x_RD), len(weight_VD)
        nll_R, log_z_R = x_RD.new_empty(R, dtype=torch.float32), x_RD.new_empty(R, dtype=torch.float32)
        grad_x_RD, weight_sum = None, None
        if differentiate:
            grad_x_RD, weight_sum = torch.empty_like(x_RD), _WeightSum(weight_VD, chunks=-(-R // chunk))
        buffer_CV = x_RD.new_empty(min(chunk, R), V)
        for begin in range(0, R, chunk):
            rows = slice(begin, min(begin + chunk, R))
            logits_CV = torch.mm(x_RD[rows], weight_VD.T, out=buffer_CV[: rows.stop - rows.start])
            counted_C = None if counted_R is None else counted_R[rows]
            nll_R[rows], log_z_R[rows] = _softmax(
                logits_CV, targets_R[rows], counted_C, z_loss, normalizer, differentiate
            )
            if grad_x_RD is not None and weight_sum is not None:  # from here logits_CV is their gradient
                torch.mm(logits_CV, weight_VD, out=grad_x_RD[rows])
                weight_sum.add(logits_CV, x_RD[rows])
        ctx.gradients = None
        if weight_sum is not None:
            ctx.gradients = grad_x_RD, weight_sum.total()
        ctx.mark_non_differentiable(nll_R, log_z_R)
        if counted_R is None:
            total = (nll_R.sum() + z_loss * log_z_R.square().sum()) / normalizer
        else:
            total = ((nll_R + z_loss * log_z_R.square()) * counted_R).sum() / normalizer
        return total, nll_R, log_z_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss have been handed out: run the forward pass again")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_total.is_cuda or float(grad_total) != 1.0:  # asking a GPU would make the host wait
            for gradient in gradients:
                gradient.mul_(grad_total)
        return (*gradients, None, None, None, None, None, None)


def _softmax(
    logits_CV: Tensor,
    targets_C: Tensor,
    counted_C: Tensor | None,
    z_loss: float,
    normalizer: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """float32 nll [C] and log_z [C]; overwrites the logits with the total loss's gradient by them if asked to.

    d total / d logit_v = ((1 + 2 z_loss log_z) softmax_v - [v is the target]) x what the token counts / normalizer
    """
    nll, log_z = [], []
    C, V = logits_CV.shape
    tile = C if logits_CV.is_cuda else max(1, TILE // V)
    buffer_cV = None if logits_CV.dtype == torch.float32 else logits_CV.new_empty(min(tile, C), V, dtype=torch.float32)
    for begin in range(0, C, tile):
        logits_cV, targets_c1 = logits_CV[begin : begin + tile], targets_C[begin : begin + tile, None]
        x_cV = logits_cV if buffer_cV is None else buffer_cV[: len(logits_cV)].copy_(logits_cV)
        target_c1, top_c1 = x_cV.gather(-1, targets_c1), x_cV.amax(-1, keepdim=True)
        total_c1 = x_cV.sub_(top_c1).exp_().sum(-1, keepdim=True)
        log_z_c1 = total_c1.log() + top_c1
        nll.append((log_z_c1 - target_c1)[:, 0])
        log_z.append(log_z_c1[:, 0])
        if differentiate:
            share_c1 = torch.full_like(target_c1, 1 / normalizer)
            if counted_C is not None:
                share_c1 *= counted_C[begin : begin + tile, None]
            x_cV.mul_((1 + 2 * z_loss * log_z_c1) * share_c1 / total_c1)
            x_cV.scatter_add_(-1, targets_c1, -share_c1)
            if buffer_cV is not None:
                logits_cV.copy_(x_cV)
    return torch.cat(nll), torch.cat(log_z)


class _WeightSum:
    """The weight's gradient summed over chunks, in float32; of one chunk it is whole at once, in the weight's dtype."""

    def __init__(self, weight_VD: Tensor, chunks: int) -> None:
        self.dtype, self.empty = weight_VD.dtype, True
        self.direct = chunks == 1 or self.dtype == torch.float32
        self.sum_VD = torch.empty_like(weight_VD, dtype=self.dtype if self.direct else torch.float32)
        # Fresh memory for every product took twice as long as the products.
        self.part_VD = None if self.direct else torch.empty_like(weight_VD[:WEIGHT_TILE])

    def add(self, grad_CV: Tensor, x_CD: Tensor) -> None:
        """sum += grad.T @ x"""
        if self.part_VD is None:
            self.sum_VD.addmm_(grad_CV.T, x_CD, beta=0 if self.empty else 1)
        else:
            for begin in range(0, len(self.sum_VD), WEIGHT_TILE):
                sum_vD = self.sum_VD[begin : begin + WEIGHT_TILE]
                part_vD = self.part_VD[: len(sum_vD)]
                torch.mm(grad_CV[:, begin : begin + WEIGHT_TILE].T, x_CD, out=part_vD)
                sum_vD.copy_(part_vD) if self.empty else sum_vD.add_(part_vD)
        self.empty = False

    def total(self) -> Tensor:
        return self.sum_VD.zero_().to(self.dtype) if self.empty else self.sum_VD.to(self.dtype)
