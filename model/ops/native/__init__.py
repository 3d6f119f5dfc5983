"""Our kernels for CPUs, compiled where they run (kernels.cpp), and what calls them with tensors.

Shape suffixes: T tokens, B sequences, N heads, K key-value heads, H head size, R rows, I inputs, O outputs, D width, F
feed-forward width, S slots of the cache.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from calumma.model.ops.native.build import library

VECTOR = 8  # numbers that are computed at once: sizes are multiples of it
MOST_SIZE = 512  # of a head
CHUNK = 128  # positions of a sequence that are one piece of work
TOGETHER = 16  # most sequences with the same pages in a piece: more of them are for other threads
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
NORMS = {None: 0, "layer": 1, "rms": 2}


@dataclass(frozen=True)
class Plan:
    """How the attention of a pass is divided; the same for every layer."""

    pages: array[int]
    items: Tensor
    count: int
    queries: Tensor
    parts: Tensor
    partials: int


class NativeKernels:
    """The kernels for tensors of one dtype. `calls`: how many have run."""

    def __init__(self, dtype: torch.dtype) -> None:
        found = library()
        assert found is not None, "ask `of`"
        self.dtype, self.calls, name = dtype, 0, NAMES[dtype]
        self._plan = found.plan_attention
        self._plan.restype = ctypes.c_int64
        self._attend, self._product, self._add_norm, self._gate, self._norm_rotate = (
            getattr(found, f"{each}_{name}") for each in ("attend", "product", "add_norm", "gate", "norm_rotate")
        )
        for each in (self._attend, self._product, self._add_norm, self._gate, self._norm_rotate):
            each.restype = None
        wide, place, small, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
        self._plan.argtypes = [*[place] * 4, *[wide] * 4, *[place] * 3]
        self._attend.argtypes = [*[wide] * 4, real, *[place] * 4, wide, place, place, wide, *[place] * 3, small]
        self._product.argtypes = [place, wide, place, wide, wide, place, small]
        self._add_norm.argtypes = [*[place] * 4, wide, wide, real, small]
        self._gate.argtypes = [place, place, wide, wide, small]
        self._norm_rotate.argtypes = [*[place] * 3, small, real, *[place] * 6, *[wide] * 4, small]

    @classmethod
    def of(cls, sample: Tensor) -> NativeKernels | None:
        """For tensors like this one; None where there are none for them."""
        if sample.device.type != "cpu" or sample.dtype not in NAMES or isinstance(sample, FakeTensor):
            return None
        return cls(sample.dtype) if library() is not None else None

    def plan(self, tables: Sequence[Sequence[int]], counts: Sequence[int], ends: Sequence[int], page: int) -> Plan:
        """Of sequences with these block tables, of which the last `counts` tokens of `ends` positions ask."""
        chunk = max(1, CHUNK // page) * page
        pages, first = array("q"), array("q")
        for table, end in zip(tables, ends, strict=True):
            first.append(len(pages))
            pages.extend(table[: -(-end // page)])
        pieces = [-(-end // chunk) for end in ends]
        most = sum(piece * count for piece, count in zip(pieces, counts, strict=True))
        items = torch.empty(sum(pieces), 4, dtype=torch.long)
        queries, parts = torch.empty(most, 3, dtype=torch.long), torch.empty(sum(counts) + 1, dtype=torch.long)
        held = [array("q", each) for each in (counts, ends)]
        places = [each.buffer_info()[0] for each in (pages, first, *held)]
        outputs = (each.data_ptr() for each in (items, queries, parts))
        count = self._plan(*places, len(tables), page, chunk, TOGETHER, *outputs)
        return Plan(pages, items, count, queries, parts, int(parts[-1]))

    def attend(self, plan: Plan, q_TNH: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[T, N*H]; keys and values: a layer's pages, [blocks, block_size, K, H]."""
        T, N, H = q_TNH.shape
        _, page, K, _ = keys.shape
        out_TX = q_TNH.new_empty(T, N * H)
        room = torch.empty(T * N * H + plan.partials * N * (H + 2), dtype=torch.float32)
        self.calls += 1
        self._attend(
            N, K, H, page, H**-0.5, q_TNH.data_ptr(), keys.data_ptr(), values.data_ptr(), out_TX.data_ptr(), T,
            plan.pages.buffer_info()[0], plan.items.data_ptr(), plan.count, plan.queries.data_ptr(),
            plan.parts.data_ptr(), room.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    @staticmethod
    def multiplies(weight_OI: Tensor) -> bool:
        outputs, inputs = weight_OI.shape  # len() of a tensor takes microseconds
        return weight_OI.is_contiguous() and not (outputs % 4 or inputs % VECTOR)

    def product(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """[R, O]; `multiplies` says of which weights. Of one row the same bits, whatever the others are."""
        x_RI = x_RI.contiguous()
        (R, inputs), outputs = x_RI.shape, weight_OI.shape[0]
        out_RO = x_RI.new_empty(R, outputs)
        self.calls += 1
        self._product(
            x_RI.data_ptr(), R, weight_OI.data_ptr(), inputs, outputs, out_RO.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out_RO

    def add_norm(self, x_RD: Tensor, more_RD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        """Adds `more` to x in place; gives RMSNorm of that."""
        normal_RD = torch.empty_like(x_RD)
        more = None if more_RD is None else more_RD.data_ptr()
        self.calls += 1
        self._add_norm(
            x_RD.data_ptr(), more, weight_D.data_ptr(), normal_RD.data_ptr(), *x_RD.shape, eps, torch.get_num_threads()
        )
        return normal_RD

    def gate(self, both_RX: Tensor) -> Tensor:
        """silu of the first half times the second, [R, 2F] -> [R, F]."""
        R, both = both_RX.shape
        out_RF = both_RX.new_empty(R, both // 2)
        self.calls += 1
        self._gate(both_RX.data_ptr(), out_RF.data_ptr(), R, both // 2, torch.get_num_threads())
        return out_RF

    def norm_rotate(
        self,
        projected_TX: Tensor,
        norm: tuple[Tensor, Tensor | None] | None,
        eps: float,
        rope_LP2: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        keys_SKH: Tensor,
        values_SKH: Tensor,
        heads: int,
    ) -> Tensor:
        """The queries [T, N, H] of a projection with queries, keys and values side by side, normalized and turned;
        keys, too, and values go to their slots. norm: weight and bias [N + K, H], LayerNorm's; RMSNorm's without a
        bias."""
        T, (_, K, H) = projected_TX.shape[0], keys_SKH.shape
        q_TNH = projected_TX.new_empty(T, heads, H)
        kind = None if norm is None else "rms" if norm[1] is None else "layer"
        weight, bias = norm or (None, None)
        self.calls += 1
        self._norm_rotate(
            projected_TX.data_ptr(), None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(), NORMS[kind], eps, rope_LP2.data_ptr(), positions_T.data_ptr(),
            slots_T.data_ptr(), q_TNH.data_ptr(), keys_SKH.data_ptr(), values_SKH.data_ptr(), T, heads, K, H,
            torch.get_num_threads(),
        )  # fmt: skip
        return q_TNH
