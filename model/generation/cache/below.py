"""What is below an engine's cache: whether there is anything, whose blocks it holds, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from calumma.model.generation.cache.disk_blocks import DiskBlocks, DiskCache, identity_of
from calumma.model.generation.cache.host_blocks import HostBlocks
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.ops.adapter import Adapter
from calumma.model.transformer import Transformer


def host_blocks(
    cache: PagedCache,
    transformer: Transformer,
    adapters: Mapping[str, Adapter] | None,
    capacity: int,
    disk: DiskCache | None,
) -> HostBlocks | None:
    """For so many bytes of the host's memory, and a disk; None for neither."""
    if not capacity and disk is None:
        return None
    if disk is None:
        return HostBlocks(cache, capacity)
    layout = f"{tuple(cache.store[:, :, 0].shape)} {cache.store.dtype} {transformer.config!r}"
    return HostBlocks(cache, capacity, DiskBlocks(disk, identity_of(_weights(transformer, adapters), layout)))


def below_statistics(held: HostBlocks | None, block_size: int) -> dict[str, int]:
    """The part of `Statistics` that is about it."""
    disk = None if held is None else held.disk
    return {
        "disk_restored_tokens": 0 if held is None else held.disk_hits * block_size,
        "host_cache_bytes": 0 if held is None else held.held,
        "disk_cache_bytes": 0 if disk is None else disk.held,
        "disk_damaged": 0 if disk is None else disk.damaged,
    }


def _weights(transformer: Transformer, adapters: Mapping[str, Adapter] | None) -> Iterator[tuple[str, Tensor]]:
    """All that a key or a value may depend on."""
    yield from transformer.state_dict().items()
    for name, adapter in sorted((adapters or {}).items()):
        for layer, low_rank in sorted(adapter.layers.items()):
            for part in ("down_RI", "up_OR", "magnitude_O"):
                if (tensor := getattr(low_rank, part)) is not None:
                    yield f"{name} {layer} {part} {low_rank.scale}", tensor
