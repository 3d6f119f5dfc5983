"""What the Transformer's attention is made of: rotary positions, the cache of keys and values, masks, kernels.

Shape suffixes: B batch, T tokens, L keys, M blocks of a sequence, N heads, K key-value heads, G heads of a key-value
head (N/K), H head size, P pairs of a head (H/2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from calumma.model.config import ModelConfig

# None: causal. BoolTensor [B, 1, T, L]: true where a token attends. BlockMask: the same for FlexAttention.
Mask = Tensor | BlockMask | None


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

    def gathered(self, blocks: int) -> Tensor:
        """Room for so many blocks of keys and of values, [2, blocks, block_size, K, H]; the next call re-uses it."""
        size = blocks * self.store[0, 0, 0].numel()
        if self._gathered.shape[1] < size:
            self._gathered = self.store.new_empty(2, size + size // 2)
        return self._gathered[:, :size].view(2, blocks, *self.store.shape[3:])


class Kept:
    """A second, contiguous copy of what B sequences hold, M blocks each: `layers`, a pair [B, K, M * block_size, H]
    each. A pass reads it and adds its tokens to it, instead of gathering blocks anew.

    tables: LongTensor [B * M], their blocks.
    """

    def __init__(self, cache: PagedCache, tables: Tensor, B: int) -> None:
        self.M, self._blocks, self._tables = len(tables) // B, cache.by_block, tables
        K, H = cache.store.shape[4:]
        shape = (B, K, self.M * cache.block_size, H)
        self.layers = [(cache.store.new_empty(shape), cache.store.new_empty(shape)) for _ in cache.by_block]
        self._first = torch.arange(B * K) * shape[2]
        self._filled = 0

    def places(self, positions_B: Tensor) -> Tensor:
        """LongTensor [B * K]: where a token of each sequence stands in a layer."""
        return self._first + positions_B.repeat_interleave(len(self._first) // len(positions_B))

    def read(self, layer: int, k_BKH: Tensor, v_BKH: Tensor, places_X: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` positions [B, K, length, H], the tokens at `places` new among them."""
        keys, values = self.layers[layer]
        if self._filled == layer:  # in the first pass: the cache has the new tokens already
            for kept, held in zip((keys, values), self._blocks[layer], strict=True):
                kept.copy_(held[self._tables].view(len(kept), -1, *held.shape[2:]).transpose(1, 2))
            self._filled += 1
        else:
            keys.flatten(0, 2).index_copy_(0, places_X, k_BKH.reshape(-1, k_BKH.shape[-1]))
            values.flatten(0, 2).index_copy_(0, places_X, v_BKH.reshape(-1, v_BKH.shape[-1]))
        return keys[:, :, :length], values[:, :, :length]


@dataclass(frozen=True)
class Rows:
    """B sequences with T tokens each that attend together, the next B*T tokens of a pass.

    tables: LongTensor [B*M], the blocks of each sequence, padded with any; or the slice of the cache's positions they
    are where a single sequence's blocks lie side by side, and nothing needs to be gathered; or what is Kept of them,
    with the tokens' `places` in it.
    bias_B1TL: added to the attention logits, 0 or -inf, L = M * block_size.
    """

    B: int
    T: int
    tables: Tensor | slice | Kept
    bias_B1TL: Tensor
    places: Tensor | None = None


class PagedPass:
    """One forward pass over a PagedCache, without gradients: T tokens of any sequences, side by side without padding.

    positions_T: LongTensor [T], each token's position in its sequence; where_T: LongTensor [T], its place in the cache,
    block * block_size + offset; `rows` cover all tokens in order. own_room: gather blocks into memory of this pass, not
    of the cache; a recorded pass has its own.
    """

    def __init__(
        self, cache: PagedCache, positions_T: Tensor, where_T: Tensor, rows: list[Rows], own_room: bool = False
    ) -> None:
        self.cache, self.positions_T, self.where_T, self.rows = cache, positions_T, where_T, rows
        self.own_room = own_room

    def attend(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Keep the new keys and values; attend to them and to all that their sequences have kept before: [T, N*H]."""
        keys, values = self.cache.by_position[layer]
        keys.index_copy_(0, self.where_T, k_TKH)
        values.index_copy_(0, self.where_T, v_TKH)
        if len(self.rows) == 1:
            return self._attend(layer, self.rows[0], q_TNH, k_TKH, v_TKH)
        outputs, begin = [], 0
        for rows in self.rows:
            end = begin + rows.B * rows.T
            own = slice(begin, end)
            outputs.append(self._attend(layer, rows, q_TNH[own], k_TKH[own], v_TKH[own]))
            begin = end
        return torch.cat(outputs)

    def _attend(self, layer: int, rows: Rows, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        if isinstance(rows.tables, Kept):
            assert rows.places is not None
            k_BKLH, v_BKLH = rows.tables.read(layer, k_TKH, v_TKH, rows.places, rows.bias_B1TL.shape[-1])
        else:
            k_BKLH, v_BKLH = (each.transpose(1, 2) for each in self._read(layer, rows))
        return _attend_rows(q_TNH, k_BKLH, v_BKLH, rows)

    def _read(self, layer: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """All keys and values of some rows, [B, L, K, H], the pass's own among them."""
        assert not isinstance(rows.tables, Kept)
        if isinstance(rows.tables, slice):
            keys, values = self.cache.by_position[layer]
            return keys[None, rows.tables], values[None, rows.tables]
        keys, values = self.cache.by_block[layer]
        if self.own_room:
            k, v = keys[rows.tables], values[rows.tables]
        else:
            k, v = self.cache.gathered(rows.tables.shape[0])
            torch.index_select(keys, 0, rows.tables, out=k)
            torch.index_select(values, 0, rows.tables, out=v)
        return k.view(rows.B, -1, *k.shape[2:]), v.view(rows.B, -1, *v.shape[2:])


def _attend_rows(q_TNH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, rows: Rows) -> Tensor:
    """[B*T, N*H]."""
    N, H = q_TNH.shape[1:]
    K, bias = k_BKLH.shape[1], rows.bias_B1TL
    if isinstance(rows.tables, Kept) and q_TNH.dtype == torch.float32:  # faster than the fused kernel
        q_XGH, k_XLH, v_XLH = q_TNH.reshape(rows.B * K, N // K, H), k_BKLH.flatten(0, 1), v_BKLH.flatten(0, 1)
        bias_X1L = bias.expand(-1, K, -1, -1).flatten(0, 1)
        weights_XGL = torch.baddbmm(bias_X1L, q_XGH, k_XLH.transpose(1, 2), alpha=H**-0.5).softmax(-1)
        return torch.bmm(weights_XGL, v_XLH).view(rows.B, N * H)
    if rows.T == 1:  # the queries that share a key head stand where further tokens would: no key is repeated for them
        q_BKGH = q_TNH.unflatten(1, (K, N // K))
        bias = bias.expand(-1, -1, N // K, -1)
        return F.scaled_dot_product_attention(q_BKGH, k_BKLH, v_BKLH, attn_mask=bias).reshape(rows.B, N * H)
    q_BNTH = q_TNH.unflatten(0, (rows.B, rows.T)).transpose(1, 2)
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKLH, v_BKLH, attn_mask=bias, enable_gqa=K != N)
    return out_BNTH.transpose(1, 2).reshape(rows.B * rows.T, N * H)


def rope_table(head_size: int, length: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """FloatTensor [length, head_size/2, 2]: cosine and sine of position x frequency (RoFormer, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def rotate(x_BTNH: Tensor, rope_BTP2: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of each head, as Llama's release does; rope is [B or 1, T, H/2, 2]."""
    pairs = x_BTNH.float().unflatten(-1, (-1, 2))
    if not torch.compiler.is_compiling():  # a complex product is one pass over memory, but not for the compiler
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope_BTP2)[:, :, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x_BTNH)
    cos, sin = rope_BTP2[:, :, None, :, 0], rope_BTP2[:, :, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_BTNH)


def attend(q_BNTH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, mask: Mask) -> Tensor:
    """FloatTensor [B, N, T, H]."""
    grouped = q_BNTH.shape[1] != k_BKLH.shape[1]
    if isinstance(mask, BlockMask):
        flex = _compiled() if q_BNTH.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return flex(q_BNTH, k_BKLH, v_BKLH, block_mask=mask, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKLH, v_BKLH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def document_mask(segments_BT: Tensor, flex: bool | None = None) -> Tensor | BlockMask:
    """Causal attention within documents, from each token's document number, LongTensor [B, T].

    FlexAttention (arXiv 2412.05496) skips the blocks in which no token sees another, which a dense mask cannot, and
    needs no [T, T] memory: taken on CUDA. Elsewhere, and with `flex` false, a dense mask for the fused kernel.
    """
    if flex is None:
        flex = segments_BT.is_cuda
    B, T = segments_BT.shape
    if not flex:
        same = segments_BT[:, :, None] == segments_BT[:, None, :]
        return (same & torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril())[:, None]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (segments_BT[b, query] == segments_BT[b, key])

    return create_block_mask(sees, B, None, T, T, device=segments_BT.device)


@cache
def _compiled() -> Any:
    """FlexAttention is a fused kernel only when compiled."""
    return torch.compile(flex_attention, dynamic=False)
