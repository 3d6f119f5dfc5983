"""The part of the training state that this worker owns: ranges of parameters, as views into DeepSpeed's optimizers.

Each element of each trained parameter is owned by one worker, which has its float32 master weight and what the
optimizer keeps of it (Adam's `exp_avg` and `exp_avg_sq`). Which ranges those are follows from the ZeRO stage and the
number of workers; the elements are the same. A checkpoint is written from these views and read into them, so that it
fits any number of workers at any stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MASTER = "fp32"  # the state that every optimizer has


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter, whose elements are counted as if it were flat."""

    parameter: str
    offset: int
    numel: int
    states: Mapping[str, Tensor]
    """State -> its elements of this range, a flat view: written to, it changes what is trained."""


@dataclass(frozen=True)
class _Flat:
    """A tensor that the optimizer knows as a parameter, and the ranges (parameter, offset, elements, where they begin
    in it) that this worker owns of it."""

    key: Tensor
    ranges: list[tuple[str, int, int, int]]


class OwnedState:
    """The state that this worker owns of an engine's. `settle` is called by every worker."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.basic_optimizer
        self._zero: Any = engine.optimizer
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        stage = engine.zero_optimization_stage()
        self._partitioned = stage > 0
        self._flats = self._of_stage_3() if stage == 3 else self._of_flat_groups() if stage else self._of_whole()
        self._swapped: Callable[[int], bool] = self._zero._swappable_optimizer_subgroup if stage == 3 else _never

    @property
    def parameters(self) -> list[str]:
        """Names of all parameters, the same on every worker."""
        return list(self._names.values())

    @property
    def ranges(self) -> list[tuple[str, int, int]]:
        """(parameter, offset, elements) of all fragments, in the order of `opened`."""
        return [(name, offset, numel) for flat in self._flats for name, offset, numel, _ in flat.ranges]

    @property
    def states(self) -> dict[str, torch.dtype]:
        """States and their types, the same on every worker: before its first step an optimizer has but the weights."""
        kept = [values.items() for values in self._optimizer.state.values()]
        found = {name: value.dtype for values in kept for name, value in values if _is_state(value)}
        return {MASTER: torch.float32} | dict(sorted(found.items()))

    @property
    def step(self) -> int:
        """Steps that the optimizer has taken."""
        counts = [values["step"] for values in self._optimizer.state.values() if "step" in values]
        counts += [group["step"] for group in self._optimizer.param_groups if "step" in group]
        return int(counts[0]) if counts else 0

    def opened(self) -> Iterator[list[Fragment]]:
        """All fragments, in as many lists as must be in memory one after the other: one, unless they are on a disk."""
        return self._opened(None)

    def filling(self, states: Sequence[str], step: int) -> Iterator[list[Fragment]]:
        """All fragments, to be overwritten, of an optimizer that has taken so many steps and has these states. When all
        workers have done it they `settle`."""
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] = step
        return self._opened((states, step))

    def _opened(self, change: tuple[Sequence[str], int] | None) -> Iterator[list[Fragment]]:
        if not any(self._swapped(number) for number in range(len(self._flats))):
            for flat in self._flats:
                self._reshape(flat, change)
            yield [fragment for flat in self._flats for fragment in self._fragments(flat)]
            return
        for number, flat in enumerate(self._flats):
            swapped = self._swapped(number)
            if swapped:
                self._zero._optimizer_states_and_gradient_swap_in(number)
            self._reshape(flat, change)
            yield self._fragments(flat)
            if swapped and change is not None:
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
                self._zero._optimizer_states_and_gradient_swap_out(number)
            elif swapped:
                self._zero._release_swap_buffers(number)

    def _reshape(self, flat: _Flat, change: tuple[Sequence[str], int] | None) -> None:
        """Let the optimizer keep these states of a flat tensor, and this count of steps."""
        if change is None:
            return
        states, step = change
        kept = self._optimizer.state[flat.key]
        if list(states) == [MASTER]:
            kept.clear()  # as before the first step
            return
        for name in [name for name, value in kept.items() if _is_state(value) and name not in states]:
            del kept[name]
        for name in states:
            if name != MASTER and name not in kept:
                kept[name] = torch.zeros_like(flat.key, dtype=torch.float32, requires_grad=False)
        # one of its own for each: torch's optimizers raise it in place
        kinds = [kind for kind in type(self._optimizer).__mro__ if kind is not torch.optim.Optimizer]
        torchs = any(kind.__module__.startswith("torch.optim") for kind in kinds)
        kept["step"] = torch.tensor(float(step)) if torchs else step

    def settle(self) -> None:
        """The master weights were written by every worker: let all workers compute with them."""
        zero, stage = self._zero, self._engine.zero_optimization_stage()
        if stage == 0:
            self._sum_up()
        elif stage < 3:
            zero.update_lp_params()
        else:
            zero._partition_all_parameters()
            for number in range(len(self._flats)):
                if not self._swapped(number):
                    zero._reassign_or_swap_out_partitioned_parameters(number)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def _fragments(self, flat: _Flat) -> list[Fragment]:
        kept = self._optimizer.state.get(flat.key, {})
        tensors = {MASTER: flat.key} | {name: value for name, value in kept.items() if _is_state(value)}
        flats = {name: tensor.detach().view(-1) for name, tensor in tensors.items()}
        return [
            Fragment(name, offset, numel, {state: tensor.narrow(0, start, numel) for state, tensor in flats.items()})
            for name, offset, numel, start in flat.ranges
        ]

    def _of_flat_groups(self) -> list[_Flat]:
        """ZeRO 1 and 2: parameters laid one behind the other, cut in equal parts wherever that is."""
        groups = getattr(self._zero, "bit16_groups", None) or self._zero.bf16_groups
        flats = []
        for parameters, group in zip(groups, self._optimizer.param_groups, strict=True):
            (key,) = group["params"]
            found = [(p, p._hp_mapping) for p in parameters if p._hp_mapping is not None]
            ranges = [
                (
                    self._names[id(p)],
                    m.lp_fragment_address.start,
                    m.lp_fragment_address.numel,
                    m.hp_fragment_address.start,
                )
                for p, m in found
            ]
            flats.append(_Flat(key, ranges))
        return flats

    def _of_stage_3(self) -> list[_Flat]:
        """Every parameter cut in equal parts, the last ones padded."""
        rank = dist.get_rank(group=self._zero.dp_process_group)
        flats = []
        for parameters, key in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            ranges, start = [], 0
            for parameter in parameters:
                part = parameter.partition_numel()
                offset = min(rank * part, parameter.ds_numel)
                if numel := min(part, parameter.ds_numel - offset):
                    ranges.append((self._names[id(parameter)], offset, numel, start))
                start += part
            flats.append(_Flat(key, ranges))
        return flats

    def _of_whole(self) -> list[_Flat]:
        """Without ZeRO every worker has all; what it owns is its part of all elements in a row."""
        trained = [p for p in self._engine.module.parameters() if p.requires_grad]
        masters = {id(p): p for p in trained}
        if hasattr(self._zero, "fp32_groups"):  # bfloat16: masters of their own
            for lows, highs in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                masters |= {id(low): high for low, high in zip(lows, highs, strict=True)}
        rank, world = dist.get_rank(), dist.get_world_size()
        total, before, flats = sum(p.numel() for p in trained), 0, []
        begin, end = total * rank // world, total * (rank + 1) // world
        for parameter in trained:
            offset, last = max(begin - before, 0), min(end - before, parameter.numel())
            name = self._names[id(parameter)]
            flats.append(
                _Flat(masters[id(parameter)], [(name, offset, last - offset, offset)] if offset < last else [])
            )
            before += parameter.numel()
        return flats

    def _sum_up(self) -> None:
        """All of the state on every worker, of which each has filled its part."""
        for flat in self._flats:
            kept = [value for value in self._optimizer.state.get(flat.key, {}).values() if _is_state(value)]
            for tensor in (flat.key.detach(), *kept):
                own = tensor.view(-1)
                begin, end = (flat.ranges[0][3], flat.ranges[0][3] + flat.ranges[0][2]) if flat.ranges else (0, 0)
                own[:begin].zero_()
                own[end:].zero_()
                if dist.get_world_size() > 1:
                    dist.all_reduce(own)
        if hasattr(self._zero, "fp32_groups"):
            for lows, highs in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
                for low, high in zip(lows, highs, strict=True):
                    low.data.copy_(high.data)


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _never(number: int) -> bool:
    return False
