"""The paged cache of keys and values.

Shape suffixes: K key-value heads, H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.config import ModelConfig


class PagedCache:
    """Keys and values in blocks of `block_size` positions, for every layer; who owns a block is not known here.

    `store`: FloatTensor [layers, 2, blocks, block_size, K, H]. kv_heads: the configuration's, or those of this shard.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_heads: int | None = None,
    ) -> None:
        self.blocks, self.block_size = blocks, block_size
        shape = (config.layers, 2, blocks, block_size, kv_heads or config.kv_heads, config.head_size)
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        # of every layer, by block [blocks, block_size, K, H] and by position [blocks * block_size, K, H]
        self.by_block = [(layer[0], layer[1]) for layer in self.store]
        self.by_position = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self.by_block]
        self._gathered = self.store.new_empty(2, 0)

    def copy(self, source: int, target: int) -> None:
        """Make one block what another is, in every layer."""
        self.store[:, :, target] = self.store[:, :, source]

    def clear(self, blocks: list[int]) -> None:
        """Set what some blocks hold to 0, in every layer."""
        self.store[:, :, blocks] = 0

    def clear_positions(self, slots: list[int]) -> None:
        """Set what some positions hold to 0, in every layer; block * block_size + offset each."""
        self.store.flatten(2, 3)[:, :, slots] = 0

    def forget_room(self) -> None:
        """Give the memory of `gather_buffer` back."""
        self._gathered = self.store.new_empty(2, 0)

    def gather_buffer(self, blocks: int) -> Tensor:
        """Room for so many blocks of keys and of values, [2, blocks, block_size, K, H]; the next call re-uses it."""
        size = blocks * self.store[0, 0, 0].numel()
        if self._gathered.shape[1] < size:
            self._gathered = self.store.new_empty(2, size + size // 2)
        return self._gathered[:, :size].view(2, blocks, *self.store.shape[3:])
