"""Muon: momentum whose update of a matrix is the nearest orthogonal one (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/), scaled as to go with AdamW's learning rate (Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A quintic whose five applications bring singular values from (0.01, 1] near 1 (the post above).
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ROUNDS = 5
MOMENTUM, CONVOLUTIONS_MOMENTUM = 0.95, 0.9  # where a specification has none
PIXEL_CHANNELS = 3
BUCKET = 1 << 24  # numbers of the matrices whose updates are held together, at least


class Muon(torch.optim.AdamW):
    """Muon for the groups that say `muon: True`, whose parameters are matrices, or the weights of convolutions, which
    are taken for matrices with a row for each output channel, by the group's `momentum`; AdamW for all others.

    Both keep the same states, so that checkpoints know no difference: `exp_avg` is the momentum, and of matrices
    `exp_avg_sq` stays 0. On CPUs it computes in float32: torch.optim.Muon is the same in bfloat16, which most CPUs
    emulate (benchmarks/RESULTS.md). Where torch.distributed is up all its workers take each step, with the same
    gradients; they divide the matrices among them and gather the updates.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        every = self.param_groups
        self._step_matrices([group for group in every if group.get("muon")])
        self.param_groups = [group for group in every if not group.get("muon")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = every

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Of each matrix one worker makes the update, for all of them: they have the same gradients."""
        settings = {id(weight): group for group in groups for weight in group["params"]}
        weights = [weight for group in groups for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] += 1
            state["exp_avg"].lerp_(weight.grad, 1 - settings[id(weight)]["momentum"])
        shared = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        for bucket in _buckets(weights, world):
            for weight, update in self._updates(shares_of(bucket, world), rank, settings):
                group = settings[id(weight)]
                longest = max(len(weight), weight.numel() // len(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * longest**0.5)  # AdamW's mean square

    def _updates(
        self, shares: list[list[Tensor]], rank: int, settings: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The weights of all workers' shares with their updates, of which this one makes its own."""
        size = max(sum(weight.numel() for weight in share) for share in shares)
        found = [shares[0][0].new_zeros(size) for _ in shares]
        for weight, place in _places(shares[rank], found[rank]):
            assert weight.grad is not None
            momentum = settings[id(weight)]["momentum"]
            matrix = weight.grad.lerp(self.state[weight]["exp_avg"], momentum).flatten(1)
            place.copy_(orthogonal(matrix).view(weight.shape))
        if len(shares) > 1:
            dist.all_gather(found, found[rank])
        for share, flat in zip(shares, found, strict=True):
            yield from _places(share, flat)


def _buckets(weights: Sequence[Tensor], workers: int) -> Iterator[list[Tensor]]:
    """Runs of weights, of which each worker has one to work at, that memory holds the updates of few at a time."""
    bucket: list[Tensor] = []
    for weight in weights:
        bucket.append(weight)
        if len(bucket) >= workers and sum(each.numel() for each in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _places(weights: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight with its part, of its shape, of a vector of all of them."""
    begin = 0
    for weight in weights:
        yield weight, flat[begin : begin + weight.numel()].view(weight.shape)
        begin += weight.numel()


def shares_of(weights: Sequence[Tensor], workers: int) -> list[list[Tensor]]:
    """The weights whose updates each worker makes, by what their products cost: the dearest first, each to whoever has
    least."""
    shares: list[list[Tensor]] = [[] for _ in range(workers)]
    costs = [0] * workers
    for weight in sorted(weights, key=_products, reverse=True):
        least = costs.index(min(costs))
        shares[least].append(weight)
        costs[least] += _products(weight)
    return shares


def _products(weight: Tensor) -> int:
    """Multiplications of a round, in proportion."""
    rows, columns = len(weight), weight.numel() // len(weight)
    return min(rows, columns) * rows * columns


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


def convolution_groups(model: nn.Module, momentum: float | None) -> list[dict[str, Any]]:
    """What is trained of a convolutional network: weights between more than three channels each for Muon, all else for
    AdamW: an image's channels, and as few of a code, make no matrix to speak of."""
    momentum = CONVOLUTIONS_MOMENTUM if momentum is None else momentum
    weights = [
        layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d) and min(layer.in_channels, layer.out_channels) > PIXEL_CHANNELS
    ]
    own = {id(weight) for weight in weights}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    return [
        {"params": [weight for weight in weights if weight.requires_grad], "muon": True, "momentum": momentum},
        {"params": rest, "muon": False},
    ]


def groups(model: nn.Module, plain: list[dict[str, Any]], momentum: float | None) -> list[dict[str, Any]]:
    """AdamW's groups, with the matrices of the blocks in groups of their own. The embedding and the output's matrix
    are looked up row by row, which AdamW suits."""
    momentum = MOMENTUM if momentum is None else momentum
    blocks = {
        id(p)
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.dim() == 2 and "norm" not in name
    }
    found = []
    for group in plain:
        for muon in (True, False):
            own = [p for p in group["params"] if (id(p) in blocks) == muon]
            found += [group | {"params": own, "muon": muon, "momentum": momentum}] if own else []
    return found
