"""Every kernel that reads pages and can run here gives what gathered keys and values give."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.generation.attention import choice, dense, packages
from calumma.model.generation.attention.flex import FlexReader
from calumma.model.generation.attention.native import NativeReader
from calumma.model.generation.attention.paged import PageReader
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.ops.native import NativeKernels

PAGE, HEADS = 8, 4
CONFIG = ModelConfig(layers=2, width=64, heads=HEADS, kv_heads=2, ffn_width=8)
TABLES = [[7, 2, 11], [7, 2, 5, 9, 0, 1], [3], [10, 6]]
LENGTHS = [17, 48, 1, 16]


@pytest.fixture
def cache() -> PagedCache:
    made = PagedCache(CONFIG, 12, PAGE)
    made.store.normal_(generator=torch.Generator().manual_seed(0))
    made.store[:, :, [4, 8]] = float("nan")  # what nobody has
    return made


def gathered(cache: PagedCache, q_TNH: Tensor, counts: list[int]) -> Tensor:
    found, begin = [], 0
    for table, count, length in zip(TABLES, counts, LENGTHS, strict=True):
        keys, values = (each[table].flatten(0, 1)[:length].transpose(0, 1)[None] for each in cache.by_block[1])
        own, begin = q_TNH[begin : begin + count], begin + count
        seen_TL = torch.arange(length) <= torch.arange(length - count, length)[:, None]
        bias = torch.zeros(1, 1, count, length).masked_fill_(~seen_TL, float("-inf"))
        found.append(dense.attend_fused(own, keys, values, bias))
    return torch.cat(found)


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 16, 1, 16], [1, 9, 1, 2]])
@pytest.mark.parametrize("name", ["native", "flex", "causal"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_pages_are_read_as_if_they_were_gathered(cache: PagedCache, name: str, counts: list[int]) -> None:
    q_TNH = torch.randn(sum(counts), HEADS, 16, generator=torch.Generator().manual_seed(1))
    expected = gathered(cache, q_TNH, counts)
    if name == "causal":
        parts = zip(q_TNH.split(counts), TABLES, LENGTHS, strict=True)
        found = [
            dense.attend_causal(q, *(each[table].flatten(0, 1)[:length] for each in cache.by_block[1]))
            for q, table, length in parts
        ]
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-6)
        return
    native = NativeKernels.of(cache.store)
    assert native is not None
    reader: PageReader = FlexReader() if name == "flex" else NativeReader(native)
    if name == "flex":
        cache.store.nan_to_num_()  # its reference, unlike its kernel, multiplies what no one sees by 0
    reads = reader.prepare(cache, TABLES, counts, LENGTHS)
    torch.testing.assert_close(reads(1, q_TNH), expected, rtol=1e-5, atol=1e-6)


class Recorded:
    """Stands where a package's function does, and does its documented arithmetic on the CPU."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int,
        causal: bool, block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert causal
        assert all(each.dtype == torch.int32 for each in (cu_q, cu_k, block_table))
        counts, lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
        assert (most_q, most_k) == (max(counts), max(lengths))
        parts = zip(q.split(counts), block_table.tolist(), lengths, strict=True)
        found = [
            dense.attend_causal(own, *(each[table].flatten(0, 1)[:n] for each in (k, v))) for own, table, n in parts
        ]
        return torch.cat(found).view(q.shape)

    def plan(
        self, qo: Tensor, kv: Tensor, pages: Tensor, last: Tensor, heads: int, kv_heads: int, size: int, page: int,
        **named: Any,
    ) -> None:  # fmt: skip
        assert named["causal"]
        lengths = (kv.diff() - 1) * page + last
        tables = [own.tolist() + [0] * 9 for own in pages.split(kv.diff().tolist())]
        table = torch.tensor([own[:9] for own in tables], dtype=torch.int32)
        ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        self.given = {"cu_q": qo, "cu_k": ends, "most_q": int(qo.diff().max()), "most_k": int(lengths.max())}
        self.given["block_table"] = table

    def run(self, q: Tensor, paged: tuple[Tensor, Tensor]) -> Tensor:
        given = dict(self.given)
        table = given.pop("block_table")
        return self.varlen(q, *paged, *given.values(), causal=True, block_table=table)


@pytest.mark.parametrize("name", ["flashinfer", "flash_attn"])
def test_packages_are_asked_as_they_are_documented(
    cache: PagedCache, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what they are given the answer follows; whether theirs is that, `benchmarks/gpu.py` tells on a GPU."""
    module, counts = ModuleType(name), [1, 9, 1, 2]
    recorded = Recorded()
    module.flash_attn_varlen_func = recorded.varlen  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = lambda workspace, layout: recorded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(packages, "WORKSPACE_BYTES", 1)
    reader: PageReader = (
        packages.FlashInferReader(HEADS, torch.device("cpu"))
        if name == "flashinfer"
        else packages.FlashAttentionReader()
    )
    q_TNH = torch.randn(sum(counts), HEADS, 16, generator=torch.Generator().manual_seed(1))
    reads = reader.prepare(cache, TABLES, counts, LENGTHS)
    torch.testing.assert_close(reads(1, q_TNH), gathered(cache, q_TNH, counts), rtol=1e-5, atol=1e-6)


def test_the_fastest_is_taken_and_what_fails_is_not(
    cache: PagedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    native = NativeKernels.of(cache.store)
    assert native is not None

    class Broken(FlexReader):
        def prepare(self, *given: Any) -> Any:
            raise RuntimeError("no kernel image for this device")

    quick = NativeReader(native)
    monkeypatch.setattr(
        choice, "readers", lambda *given: iter([("broken", Broken()), ("slow", FlexReader()), ("quick", quick)])
    )
    times = iter([2e-3, 1e-3])
    monkeypatch.setattr(choice, "_seconds", lambda *given: next(times))
    assert choice.fastest(CONFIG, HEADS, cache, native) == ("quick", quick)
    assert "no kernel image" in caplog.text
    monkeypatch.setattr(choice, "readers", lambda *given: iter([]))
    assert choice.fastest(CONFIG, HEADS, cache, None) == ("gathered", None)
