"""Workers that share their rows, for contexts too long for one: sequence parallelism by DeepSpeed-Ulysses
(arXiv 2309.14509, `deepspeed.sequence.layer`).

Each worker of such a group computes a part of every row. What is of a token alone needs no other part; around attention
the group exchanges parts of all heads for some heads of all tokens, and back, by all-to-all. A worker's loss is the sum
over its own targets, and its gradients are those of all losses by what passes through it: the sum over all workers,
which ZeRO takes of gradients as ever, is the step's.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.ops.attention import Mask
from calumma.model.ops.sharing import attend_whole
from calumma.model.transformer import Transformer

_MAXIMA = ("attention_logit_max", "log_z_max")


class UlyssesRows:
    """This worker's part of rows that a group of neighbours shares (a `model.ops.sharing.SharedRows`)."""

    def __init__(self, size: int, timeout: timedelta) -> None:
        """Every worker calls it; their number is a multiple of `size`."""
        from deepspeed.sequence.layer import DistributedAttention

        self.size, self.number = size, dist.get_rank() % size
        self.group, _ = dist.new_subgroups(size, timeout=timeout)
        self._attention: Any = DistributedAttention(_attend_measured, self.group, scatter_idx=2, gather_idx=1)
        # torch.compile would look into DeepSpeed's all-to-all, and lose its gradient (deepspeed/sequence/layer.py says
        # so). Not a decorator: that would import the compiler wherever this module is.
        self.attend = torch.compiler.disable(self._attend)

    def _attend(
        self, q_BtNH: Tensor, k_BtKH: Tensor, v_BtKH: Tensor, mask: Mask, measure: bool
    ) -> tuple[Tensor, Tensor | None]:
        found = list[Tensor]()
        out_BtNH: Tensor = self._attention(q_BtNH, k_BtKH, v_BtKH, 0, None, mask, found if measure else None)
        return out_BtNH, found[0] if found else None

    def combined(self, stability: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the workers of a group have measured, each of its heads and tokens, as of whole rows; every worker of
        the group calls it."""
        if not stability:
            return {}
        names = sorted(stability)
        own = torch.stack([stability[name].double() for name in names])
        # a part without a trained token has no logits, and measures zeros
        seen = torch.tensor([float("/" in name or bool(stability["logit_norm"] > 0)) for name in names]).to(own)
        squares = torch.tensor([name.endswith("activation_rms") for name in names], device=own.device)
        means = torch.stack([torch.where(squares, own.square(), own) * seen, seen])
        maxima = torch.where(seen > 0, own, -torch.inf)
        dist.all_reduce(means, group=self.group)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group)
        mean = means[0] / means[1].clamp(min=1)
        mean = torch.where(squares, mean.sqrt(), mean)
        return {
            name: maxima[i].nan_to_num(neginf=0.0) if name.endswith(_MAXIMA) else mean[i]
            for i, name in enumerate(names)
        }


def _attend_measured(q_BTnH: Tensor, k_BTkH: Tensor, v_BTkH: Tensor, mask: Mask, found: list[Tensor] | None) -> Tensor:
    """Attention of some heads over whole rows; what is measured of it is put into `found`."""
    out_BTnH, measured = attend_whole(q_BTnH, k_BTkH, v_BTkH, mask, found is not None)
    if found is not None and measured is not None:
        found.append(measured)
    return out_BTnH


def share_rows(model: Transformer, size: int, timeout: timedelta) -> None:
    """Let so many neighbouring workers share their rows. Every worker calls it."""
    if size > 1:
        model.share_rows(UlyssesRows(size, timeout))


def combined(model: Any, stability: dict[str, Tensor]) -> dict[str, Tensor]:
    """`UlyssesRows.combined` where rows are shared, else the same."""
    shared = model.shared
    return shared.combined(stability) if isinstance(shared, UlyssesRows) else stability


def indivisible(config: ModelConfig, context: int, size: int) -> list[str]:
    """What so many workers cannot divide among themselves, as ends of sentences."""
    found = {"heads": config.heads, "key-value heads": config.kv_heads, "tokens of a row": context}
    return [f"{number} {what}" for what, number in found.items() if number % size]
