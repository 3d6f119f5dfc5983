"""Muon: momentum whose update of a matrix is the nearest orthogonal one (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), scaled as to go with AdamW's learning rate (Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# A quintic whose five applications bring singular values from (0.01, 1] near 1 (the post above).
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ROUNDS = 5


class Muon(torch.optim.AdamW):
    """Muon for the groups that say `muon: True`, whose parameters are matrices; AdamW for all others.

    Both keep the same states, so that checkpoints know no difference: `exp_avg` is the momentum, and of matrices
    `exp_avg_sq` stays 0. On CPUs it computes in float32: torch.optim.Muon is the same in bfloat16, which most CPUs
    emulate (benchmarks/RESULTS.md).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if group.get("muon"):
                self._step_matrices(group)
        every = self.param_groups
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = every

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] += 1
            state["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
            update = orthogonal(weight.grad.lerp(state["exp_avg"], MOMENTUM))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)  # AdamW's mean square


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """[M, N] -> the orthogonal matrix nearest to it, nearly: singular values from 0.7 to 1.2, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrix_MN.is_cuda else torch.float32
    x = matrix_MN.to(dtype)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix_MN.shape[0] > matrix_MN.shape[1] else x).to(matrix_MN)


def groups(model: nn.Module, plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AdamW's groups, with the matrices of the blocks in groups of their own. The embedding and the output's matrix
    are looked up row by row, which AdamW suits."""
    blocks = {
        id(p)
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.dim() == 2 and "norm" not in name
    }
    found = []
    for group in plain:
        for muon in (True, False):
            own = [p for p in group["params"] if (id(p) in blocks) == muon]
            found += [group | {"params": own, "muon": muon}] if own else []
    return found
