"""How the tokens of a pass lie side by side, and which sequences attend together.

Shape suffixes: T tokens of a pass or of each of B sequences, L keys, M blocks of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calumma.model.generation.attention.paged import (
    AttentionGroup,
    CausalGroup,
    PagedAttention,
    PageGroup,
    PageReader,
)
from calumma.model.generation.cache.contiguous import ContiguousCache
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence

# Sequences with so few new tokens attend together where their lengths are alike; longer ones each alone.
TOGETHER = 8


class BatchLayout:
    """Where the tokens of a pass stand: sequences with few new tokens first, alike ones together.

    tokens: of all sequences, side by side. adapters: the number of each token's adapter; empty where all are computed
    by the plain model. last: index of each sequence's last token in them, by the sequence's id().
    """

    def __init__(self, pairs: list[tuple[Sequence, int]], block_size: int) -> None:
        self.block_size = block_size
        self.groups: list[list[tuple[Sequence, int]]] = []
        for pair in sorted(pairs, key=lambda pair: (pair[1], -pair[0].cached)):
            sequence, count = pair
            group = self.groups[-1] if self.groups else []
            # what is padded to the longest of a group is read in vain
            alike = group and count <= TOGETHER and count == group[0][1]
            if alike and 2 * (sequence.cached + count) + 4 * block_size >= group[0][0].cached + count:
                group.append(pair)
            else:
                self.groups.append([pair])
        self.tokens: list[int] = []
        self.adapters: list[int] = []
        adapted = any(sequence.adapter for sequence, _ in pairs)
        self.last: dict[int, int] = {}
        for sequence, count in (pair for group in self.groups for pair in group):
            self.tokens += sequence.tokens[sequence.cached : sequence.cached + count]
            self.last[id(sequence)] = len(self.tokens) - 1
            if adapted:
                self.adapters += [sequence.adapter] * count

    def split(self) -> tuple[BatchLayout | None, BatchLayout | None]:
        """The sequences with a token each, which come first, and the others; as layouts of their own."""
        pairs = [pair for group in self.groups for pair in group]
        single = [pair for pair in pairs if pair[1] == 1]
        others = [pair for pair in pairs if pair[1] > 1]
        if not single or not others:
            return (self, None) if single else (None, self)
        return BatchLayout(single, self.block_size), BatchLayout(others, self.block_size)

    def step(
        self,
        cache: PagedCache,
        step: int,
        device: torch.device,
        contiguous: ContiguousCache | None = None,
        reader: PageReader | None = None,
    ) -> PagedAttention:
        """The pass that is `step` passes after this layout's; its sequences have the blocks for it. `reader` reads the
        pages of sequences with as few tokens as it is good for; those of others are gathered."""
        size = self.block_size
        positions: list[int] = []
        slots: list[int] = []
        for sequence, count in (pair for group in self.groups for pair in group):
            first = sequence.cached + step
            if count == 1:
                positions.append(first)
                slots.append(sequence.blocks[first // size] * size + first % size)
                continue
            own = range(first, first + count)
            positions += own
            slots += [sequence.blocks[p // size] * size + p % size for p in own]
        # without waiting: the host issues passes ahead of the device
        positions_T, slots_T = (torch.tensor(each).to(device, non_blocking=True) for each in (positions, slots))
        groups: list[AttentionGroup | CausalGroup | PageGroup] = []
        begin, most = 0, 0 if reader is None else reader.most_tokens
        read = [pair for group in self.groups for pair in group if pair[1] <= most]  # the first, as they are sorted
        if reader is not None and read:
            tables, counts = [sequence.blocks for sequence, _ in read], [count for _, count in read]
            lengths = [sequence.cached + step + count for sequence, count in read]
            begin = sum(counts)
            groups.append(PageGroup(begin, reader.prepare(cache, tables, counts, lengths)))
        for group in self.groups:
            if group[0][1] > most:
                end = begin + len(group) * group[0][1]
                own_T = positions_T[begin:end]
                groups.append(self._group(group, positions[begin:end], own_T, cache, device, contiguous))
                begin = end
        if contiguous is not None:
            contiguous.drop_unused()
        return PagedAttention(cache, positions_T, slots_T, groups)

    def _group(
        self,
        group: list[tuple[Sequence, int]],
        positions: list[int],
        positions_T: Tensor,
        cache: PagedCache,
        device: torch.device,
        contiguous: ContiguousCache | None,
    ) -> AttentionGroup | CausalGroup:
        B, T, size = len(group), group[0][1], self.block_size
        M = -(-(1 + max(positions)) // size)
        sequences = [sequence for sequence, _ in group]
        own = sequences[0].blocks[:M]
        if B == 1 and T > 1 and device.type == "cpu":
            together = own == list(range(own[0], own[0] + M))
            blocks = slice(own[0] * size, (own[0] + M) * size) if together else torch.tensor(own)
            return CausalGroup(T, positions[-1] + 1, blocks)
        seen_BTL = torch.arange(M * size, device=device) <= positions_T.view(B, T, 1)
        bias_B1TL = torch.zeros(B, 1, T, M * size, device=device, dtype=cache.store.dtype)
        bias_B1TL.masked_fill_(~seen_BTL[:, None], float("-inf"))
        if B == 1 and own == list(range(own[0], own[0] + M)):
            return AttentionGroup(B, T, slice(own[0] * size, (own[0] + M) * size), bias_B1TL)
        if T == 1 and contiguous is not None:
            copy = contiguous.find(sequences, positions, M)
            if copy is not None:
                return AttentionGroup(B, T, copy, bias_B1TL, copy.slots(positions_T))
        # filled up with its own: what another sequence's block holds may not be numbers
        tables = [block for s in sequences for block in (s.blocks + s.blocks[-1:] * M)[:M]]
        return AttentionGroup(B, T, torch.tensor(tables).to(device, non_blocking=True), bias_B1TL)
