"""Which kernel reads the pages: those that the device and what is installed allow are tried when an engine starts, on a
small cache of the model's own shape, and the fastest stays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch

from calumma.model.config import ModelConfig
from calumma.model.generation.attention.flex import FlexReader
from calumma.model.generation.attention.native import NativeReader
from calumma.model.generation.attention.packages import (
    FLASH_PAGE,
    FlashAttentionReader,
    FlashInferReader,
    installed,
)
from calumma.model.generation.attention.paged import PagedAttention, PageGroup, PageReader
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.ops.native import NativeKernels

log = logging.getLogger(__name__)

SEQUENCES, LENGTH = 16, 1024  # what is tried
TRIES = 3


def readers(cache: PagedCache, heads: int, native: NativeKernels | None) -> Iterator[tuple[str, PageReader]]:
    """All that can read this cache. One that is installed and cannot even be made says so in the log."""
    device, dtype = cache.store.device, cache.store.dtype
    if native is not None:
        yield "native", NativeReader(native)
    if device.type != "cuda":
        return
    yield "flex", FlexReader()
    made: dict[str, Callable[[], PageReader]] = {
        "flashinfer": lambda: FlashInferReader(heads, device),
        "flash_attn": FlashAttentionReader,
    }
    for name, make in made.items():
        fits = dtype in (torch.bfloat16, torch.float16) and (name != "flash_attn" or not cache.block_size % FLASH_PAGE)
        if fits and installed(name):
            try:
                yield name, make()
            except Exception as error:
                log.warning("%s is installed and cannot be used: %r", name, error)


def fastest(
    config: ModelConfig, heads: int, like: PagedCache, native: NativeKernels | None
) -> tuple[str, PageReader | None]:
    """The name of the fastest and itself; on a CPU ours wherever it can be compiled, and None, for gathered pages,
    where there is none."""
    found = list(readers(like, heads, native))
    if len(found) < 2:
        return found[0] if found else ("gathered", None)
    kv_heads, size, device = like.store.shape[4], like.block_size, like.store.device
    blocks = SEQUENCES * -(-LENGTH // size)
    one = config.model_copy(update={"layers": 1})
    cache = PagedCache(one, blocks, size, device, like.store.dtype, kv_heads)
    tables = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(SEQUENCES, -1).tolist()
    q_TNH = torch.zeros(SEQUENCES, heads, config.head_size, device=device, dtype=like.store.dtype)
    seconds: dict[str, float] = {}
    for name, reader in found:
        try:
            reads = reader.prepare(cache, tables, [1] * SEQUENCES, [LENGTH] * SEQUENCES)
            seconds[name] = _seconds(PagedAttention(cache, q_TNH, q_TNH, [PageGroup(SEQUENCES, reads)]), q_TNH)
        except Exception as error:  # a kernel that this device or version has not
            log.warning("attention with %s failed and is not used: %r", name, error)
    if not seconds:
        return "gathered", None
    name = min(seconds, key=lambda each: seconds[each])
    log.info("attention with %s: %s", name, ", ".join(f"{each} {1e6 * s:.0f} µs" for each, s in seconds.items()))
    return name, dict(found)[name]


def _seconds(paged: PagedAttention, q_TNH: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(TRIES + 1):
        _wait(q_TNH)
        began = time.perf_counter()
        paged.attend(0, q_TNH)
        _wait(q_TNH)
        best = min(best, time.perf_counter() - began)  # the first compiles
    return best


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
