"""Our kernels for CPUs give what PyTorch's own do in float64, and the same bits in any company."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calumma.model.ops import fused
from calumma.model.ops.native import NativeKernels, build
from calumma.model.ops.rope import rope_table

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def kernels(dtype: torch.dtype) -> NativeKernels:
    found = NativeKernels.of(torch.zeros(1, dtype=dtype))
    assert found is not None, "CONTRIBUTING.md asks for a C++ compiler"
    return found


def close(found: Tensor, exact: Tensor) -> None:
    """As near as the dtype's rounding of the result and of what it is summed from allows."""
    tolerance = 2e-6 if found.dtype == torch.float32 else 1e-2
    scale = float(exact.abs().max().clamp(min=1))
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * scale)


def attention(q_TNH: Tensor, store: Tensor, tables: list[list[int]], counts: list[int], ends: list[int]) -> Tensor:
    """As it is defined, in float64."""
    rows, token, group = [], 0, q_TNH.shape[1] // store.shape[3]
    for table, count, end in zip(tables, counts, ends, strict=True):
        keys, values = (each[table].flatten(0, 1).double().repeat_interleave(group, 1) for each in store)
        for length in range(end - count + 1, end + 1):
            q_NH = q_TNH[token].double()
            logits_NL = torch.einsum("nh,lnh->nl", q_NH, keys[:length]) / q_NH.shape[1] ** 0.5
            rows.append(torch.einsum("nl,lnh->nh", logits_NL.softmax(-1), values[:length]).flatten())
            token += 1
    return torch.stack(rows)


@dtypes
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_attention_by_page(dtype: torch.dtype, data: st.DataObject) -> None:
    """Any lengths, some sequences with the same first pages; alone each has the same bits, by any number of threads."""
    native, page = kernels(dtype), data.draw(st.sampled_from([1, 5, 8, 32]))
    K, group, H = data.draw(st.sampled_from([(1, 4, 64), (2, 2, 8), (3, 1, 24), (2, 1, 128)]))
    ends = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6))
    counts = [data.draw(st.integers(1, min(4, end))) for end in ends]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    store = torch.randn(2, 300, page, K, H, generator=generator).to(dtype)
    prefix = torch.randint(300, (-(-max(ends) // page),), generator=generator).tolist()
    tables = []
    for end in ends:
        need, shared = -(-end // page), data.draw(st.sampled_from([0, 100, 299])) // page
        own = torch.randint(300, (need,), generator=generator).tolist()
        tables.append((prefix[:shared] + own[shared:])[:need])
    q_TNH = torch.randn(sum(counts), K * group, H, generator=generator).to(dtype)
    found = native.attend(native.plan(tables, counts, ends, page), q_TNH, *store)
    close(found, attention(q_TNH, store, tables, counts, ends))
    begin = 0
    torch.set_num_threads(2)
    for table, count, end in zip(tables, counts, ends, strict=True):
        own = slice(begin, begin + count)
        alone = native.attend(native.plan([table], [count], [end], page), q_TNH[own].contiguous(), *store)
        assert torch.equal(alone, found[own])
        begin += count
    torch.set_num_threads(1)


def test_pages_that_sequences_share_are_read_once() -> None:
    """The pieces of work of sixteen sequences with a common prefix are hardly more than of one."""
    native, shared = kernels(torch.float32), list(range(100, 164))
    pieces = []
    for count in (1, 16):
        tables = [[*shared, number] for number in range(count)]
        plan = native.plan(tables, [1] * count, [64 * 32 + 5] * count, 32)
        pieces.append(plan.count)
    assert pieces == [16 + 1, 16 + 16]


@dtypes
def test_what_is_no_number_stays_none_and_beyond_a_length_nothing_is_read(dtype: torch.dtype) -> None:
    native = kernels(dtype)
    store, q_TNH = torch.randn(2, 3, 8, 2, 8).to(dtype), torch.randn(1, 2, 8).to(dtype)
    plan = native.plan([[0, 1]], [1], [12], 8)
    expected = native.attend(plan, q_TNH, *store)
    store[:, 1, 4:] = float("nan")
    assert torch.equal(native.attend(plan, q_TNH, *store), expected)
    for part in range(2):  # of a key, of a value
        broken = store.clone()
        broken[part, 0, 3, 1] = float("nan")
        found = native.attend(plan, q_TNH, *broken).view(2, 8)
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


@dtypes
@pytest.mark.parametrize(("outputs", "inputs"), [(4, 8), (36, 24), (20, 64), (300, 96)])
def test_products(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    native, generator = kernels(dtype), torch.Generator().manual_seed(0)
    x_RI = torch.randn(11, inputs, generator=generator).to(dtype)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(dtype)
    whole = native.product(x_RI, weight_OI)
    close(whole, x_RI.double() @ weight_OI.double().T)
    for rows in range(1, 11):
        assert torch.equal(native.product(x_RI[:rows], weight_OI), whole[:rows])
    assert not native.multiplies(weight_OI.t())
    assert not native.multiplies(torch.zeros(6, 8))


@dtypes
@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_norms_rotations_and_gates(dtype: torch.dtype, norm: str | None) -> None:
    """Against the plain functions in float64."""
    native, generator = kernels(dtype), torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x_TD, more_TD, weight_D = random(7, 48), random(7, 48), random(48)
    for more in (None, more_TD):
        added = x_TD.clone()
        normal = native.add_norm(added, more, weight_D, 1e-5)
        exact = fused.add_norm(x_TD.double(), None if more is None else more.double(), weight_D.double(), 1e-5)
        close(added, exact[0])
        close(normal, F.rms_norm(added.double(), (48,), weight_D.double(), 1e-5))
    both_TX = 30 * random(7, 48)
    close(native.gate(both_TX), fused.gate(both_TX.double()))
    N, K, H, slots_T = 4, 2, 16, torch.tensor([5, 0, 11, 3, 8, 2, 9])
    projected, positions_T = random(7, (N + 2 * K) * H), torch.tensor([0, 3, 19, 1, 1, 7, 2])
    given = None if norm is None else (random(N + K, H), random(N + K, H) if norm == "layer" else None)
    wide = None if given is None else tuple(each if each is None else each.double() for each in given)
    rope_LP2 = rope_table(H, 20, 10_000.0)
    found, exact = [], []
    for into, function, values, own in (
        (found, native.norm_rotate, projected, given), (exact, fused.norm_rotate, projected.double(), wide)
    ):  # fmt: skip
        keys, kept = (torch.zeros(12, K, H, dtype=values.dtype) for _ in range(2))
        q_TNH = function(values, own, 1e-5, rope_LP2, positions_T, slots_T, keys, kept, N)
        into += [q_TNH, keys, kept]
    for one, other in zip(found, exact, strict=True):
        close(one, other)


KILLED = """
import sys
from pathlib import Path
from calumma.model.ops.native import build
build.compiled(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_killed_compilation_holds_nobody_up(tmp_path: Path) -> None:
    slow, marker = tmp_path / "slow", tmp_path / "begun"
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo 1\ntouch {marker}\nexec sleep 600\n')
    slow.chmod(0o700)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(slow), str(tmp_path / "cache")], start_new_session=True
    )
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    quick = tmp_path / "quick"
    quick.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec echo 1\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )
    quick.chmod(0o700)
    made = build.compiled(str(quick), tmp_path / "cache")
    assert made.is_file()
    quick.write_text("#!/bin/sh\n[ $1 = --version ] && exec echo 1\nexit 1\n")
    assert build.compiled(str(quick), tmp_path / "cache") == made, "compiled once"


def test_without_a_compiler_pytorchs_kernels_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path, compiler in ((str(tmp_path / "nothing"), None), (os.environ["PATH"], str(broken))):
        build.library.cache_clear()
        monkeypatch.setenv("PATH", path)
        if compiler is not None:
            monkeypatch.setenv("CXX", compiler)
        assert NativeKernels.of(torch.zeros(1)) is None
        assert fused.Operations(torch.zeros(1), 8, 8, 1e-5).native is None
        with pytest.raises(ValueError, match="compiler"):
            fused.Operations(torch.zeros(1), 8, 8, 1e-5, "native")
    build.library.cache_clear()


@pytest.mark.parametrize("norm", ["layer", "rms", None])
def test_what_is_compiled_for_a_gpu_is_one_graph_and_gives_the_same(norm: str | None) -> None:
    """Traced as for a GPU, for any number of tokens, and run without generating its kernels."""
    N, K, H = 4, 2, 16
    both = None if norm is None else (torch.randn(N + K, H), torch.randn(N + K, H) if norm == "layer" else None)

    def pairs(name: str, arguments: Callable[[], tuple[Any, ...]]) -> tuple[Any, Any]:
        function = getattr(fused, name)
        traced = torch.compile(function, backend="aot_eager", dynamic=True, fullgraph=True)
        return traced(*arguments()), function(*arguments())

    rope = rope_table(H, 9, 1e4)
    for T in (3, 5):
        x_TD, wide_TX, slots_T = torch.randn(2, T, 48), torch.randn(T, (N + 2 * K) * H), torch.randperm(8)[:T]
        for name, arguments in (
            ("add_norm", lambda: (*x_TD, torch.ones(48), 1e-5)),  # noqa: B023
            ("gate", lambda: (x_TD[0],)),  # noqa: B023
            ("norm_rotate", lambda: (wide_TX, both, 1e-5, rope, slots_T, slots_T, *torch.zeros(2, 8, K, H), N)),  # noqa: B023
        ):  # fmt: skip
            torch.testing.assert_close(*pairs(name, arguments))


def test_products_are_whose_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MEASURED", 1)
    weight_OI = torch.zeros(8, 8)
    for ours, theirs, rows in (
        ([1, 1, 1], [1, 1, 1], range(1, fused.MOST_ROWS)),
        ([2, 1, 1], [1, 1, 1], range(2, fused.MOST_ROWS)),
        ([1, 1, 2], [1, 1, 1], range(1, 64)),
        ([2, 2, 2], [1, 1, 1], range(2, 4)),
    ):
        times = iter(each for pair in zip(ours, theirs, strict=True) for each in pair)
        monkeypatch.setattr(fused, "_seconds", lambda *given, times=times: next(times))
        for choice, found in (("auto", rows), ("native", range(1, fused.MOST_ROWS))):
            operations = fused.Operations(weight_OI, 8, 8, 1e-5, choice)  # type: ignore[arg-type]
            operations.measure([weight_OI])
            assert operations.native_rows == found
