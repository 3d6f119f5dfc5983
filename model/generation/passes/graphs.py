"""Decode passes of fixed shapes, to be recorded as CUDA graphs: at a token a sequence, launching kernels costs a GPU's
host more than the GPU's work (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

A pass in which every sequence has one new token is filled up to a number of sequences and of blocks from short lists,
and reads its inputs from buffers that stay where they are. What it is filled up with writes to a block that nobody
owns. Without a GPU the same passes run unrecorded.

Shape suffixes: B sequences, filled up; M blocks of each, filled up; L positions of M blocks; D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calumma.model.generation.attention.paged import (
    AttentionGroup,
    PagedAttention,
    PageGroup,
    PageReader,
    RecordableReader,
)
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout

# Sequences of a pass; more of them are not recorded.
SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
WARM_UP = 2


class CudaGraphs:
    """Passes by shape, each made when it is first asked for, or before (`prepare`). The cache's last block is the one
    that nobody owns. `reader` reads pages where they are, if it can be recorded; else they are gathered."""

    def __init__(self, decoder: Decoder, cache: PagedCache, longest: int, reader: PageReader | None = None) -> None:
        """longest: most blocks of a sequence."""
        self.decoder, self.cache = decoder, cache
        self.reader = reader if isinstance(reader, RecordableReader) else None
        most = (1 << max(0, longest - 1).bit_length()).bit_length()
        self.blocks = sorted({min(1 << power, longest) for power in range(most)})
        self.passes: dict[tuple[int, int], FixedShapePass] = {}
        self.recording = True
        self._pool: Any = None

    def clear(self) -> None:
        """Drop what is recorded, and its memory."""
        self.passes, self._pool = {}, None

    def prepare(self, sequences: int) -> None:
        """Record all shapes of up to so many sequences now, the largest first, whose memory the others use again."""
        most = next((count for count in SEQUENCES if count >= sequences), SEQUENCES[-1])
        for B in reversed([count for count in SEQUENCES if count <= most]):
            for M in reversed(self.blocks):
                self._record(self._pass(B, M))

    def _pass(self, B: int, M: int) -> FixedShapePass:
        if (B, M) not in self.passes:
            self.passes[B, M] = FixedShapePass(self.decoder, self.cache, B, M, self.reader)
        return self.passes[B, M]

    def _record(self, fixed: FixedShapePass) -> None:
        if fixed.graph is None and self.recording and self.decoder.shard.recordable:
            self.recording = False  # where it fails, for lack of memory, it is not tried again
            self._pool = fixed.record(self._pool)
            self.recording = True

    def hidden(self, tokens_T: Tensor, layout: BatchLayout, step: int) -> Tensor | None:
        """What `Decoder.hidden` gives for a layout's pass, to be read before the next; None where its shape is not to
        be recorded."""
        pairs = [pair for group in layout.groups for pair in group]
        longest = max(sequence.cached for sequence, _ in pairs) + step
        if len(pairs) > SEQUENCES[-1] or any(count > 1 for _, count in pairs):
            return None
        size = self.cache.block_size
        B = next(count for count in SEQUENCES if count >= len(pairs))
        M = next(count for count in self.blocks if count * size > longest)
        fixed = self._pass(B, M)
        spare, missing = self.cache.blocks - 1, B - len(pairs)
        positions = [sequence.cached + step for sequence, _ in pairs]
        slots = [s.blocks[p // size] * size + p % size for (s, _), p in zip(pairs, positions, strict=True)]
        tables = [(s.blocks + [spare] * M)[:M] for s, _ in pairs] + [[spare] * M] * missing
        adapters = (layout.adapters or [0] * len(pairs)) + [0] * missing
        fixed.fill(tokens_T, positions + [0] * missing, slots + [spare * size] * missing, tables, adapters)
        if tokens_T.is_cuda:
            self._record(fixed)
        return fixed.run()[: len(pairs)]


class FixedShapePass:
    """One token of each of B sequences with M blocks each, the inputs in `tokens_B`, `positions_B`, `slots_B`,
    `adapters_B`, `tables_BM`; the output in `out_BD` once it is recorded."""

    def __init__(
        self, decoder: Decoder, cache: PagedCache, B: int, M: int, reader: RecordableReader | None = None
    ) -> None:
        self.decoder, self.cache, self.B, self.M, self.reader = decoder, cache, B, M, reader
        self.device = cache.store.device
        inputs = torch.zeros(4, B, dtype=torch.long, device=self.device)
        self.tokens_B, self.positions_B, self.slots_B, self.adapters_B = inputs
        self.tables_BM = torch.zeros(B, M, dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out_BD: Tensor | None = None

    def fill(
        self, tokens_T: Tensor, positions: list[int], slots: list[int], tables: list[list[int]], adapters: list[int]
    ) -> None:
        self.tokens_B[: len(tokens_T)].copy_(tokens_T)
        self.tokens_B[len(tokens_T) :].zero_()
        given_of = (
            (self.positions_B, positions),
            (self.slots_B, slots),
            (self.tables_BM, tables),
            (self.adapters_B, adapters),
        )
        for held, given in given_of:
            held.copy_(torch.tensor(given), non_blocking=True)  # or the host would wait for the pass before

    def compute(self) -> Tensor:
        """[B, D]: nothing in here depends on what the inputs hold, on the host."""
        adapters_B = self.adapters_B if self.decoder.adapters else None
        if self.reader is not None:
            reads = self.reader.prepare_fixed(self.cache, self.tables_BM, self.positions_B)
            paged = PagedAttention(self.cache, self.positions_B, self.slots_B, [PageGroup(self.B, reads)])
            return self.decoder.hidden(self.tokens_B, paged, adapters_B)
        L = self.M * self.cache.block_size
        seen_BL = torch.arange(L, device=self.device) <= self.positions_B[:, None]
        bias_BL = torch.zeros(self.B, L, device=self.device, dtype=self.cache.store.dtype)
        bias_BL.masked_fill_(~seen_BL, float("-inf"))
        group = AttentionGroup(self.B, 1, self.tables_BM.flatten(), bias_BL[:, None, None])
        paged = PagedAttention(self.cache, self.positions_B, self.slots_B, [group], own_memory=True)
        return self.decoder.hidden(self.tokens_B, paged, adapters_B)

    def record(self, pool: Any) -> Any:
        """Record `compute` in the memory pool of those recorded before, of which only one runs at a time; gives the
        pool. What the warm-up writes to the cache the pass itself writes again."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may decode images meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.out_BD = self.compute()
        self.graph = graph
        return graph.pool()

    def run(self) -> Tensor:
        if self.graph is None or self.out_BD is None:
            return self.compute()
        self.graph.replay()
        return self.out_BD
