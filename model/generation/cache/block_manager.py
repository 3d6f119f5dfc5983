"""Who owns which block of the cache, and which blocks hold what: the bookkeeping of paged attention (arXiv 2309.06180).

A block is free, referenced by one or more sequences, or idle: referenced by nobody, but kept with what it holds until
its room is needed, the longest unused first. What a block holds is found by content: the chain of digests of the full
blocks before it, and its own tokens. The chain begins with the request's salt and adapter: requests of different ones
find nothing of each other, and cannot tell by the time that an answer takes what others have asked. Sequences share
full blocks; of a block that agrees only in part, or that is not full, a sequence takes a copy, because it will write
the rest itself.

What is evicted may be kept elsewhere (`below`, host_blocks.py) and is put back into a block when a context needs it.

Only what is verified, to be numbers, can be found by others. What is not is cleared when its blocks are given back:
attention multiplies what it masks by 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Protocol

from calumma.model.generation.cache.sequence import Sequence


class Below(Protocol):
    """Where full blocks go that are evicted, by the digest of their chain."""

    def keep(self, digest: bytes, block: int) -> None:
        """Hold what a block holds."""
        ...

    def restore(self, digest: bytes, block: int) -> bool:
        """Put it into a block again; false, and nothing happens, where it is not there."""
        ...


BLOCK_SIZE = 32  # positions of a block, unless an engine is told otherwise
BlockContent = tuple[tuple[int, ...], int]  # the tokens of a block and its number


class BlockManager:
    """`count` blocks of `size` positions. copy(source, target) copies what a block holds, clear(blocks) sets it to 0.

    share: whether what is written can be found by others (prefix caching). below: where evicted blocks are kept.
    hit_tokens, restored_tokens: of contexts, found instead of computed, and those of them that were below;
    looked_up_tokens: of all contexts that were looked up.
    """

    def __init__(
        self,
        count: int,
        size: int,
        copy: Callable[[int, int], None],
        clear: Callable[[list[int]], None],
        share: bool = True,
        below: Below | None = None,
    ) -> None:
        self.count, self.size, self.share = count, size, share
        self.references = [0] * count
        self.hit_tokens = self.restored_tokens = self.looked_up_tokens = 0
        self.evictions = 0
        self._below = below if share else None
        self._copy, self._clear = copy, clear
        self._free = list(reversed(range(count)))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # of a block: the chain before it, its tokens
        self._children: dict[bytes, list[BlockContent]] = {}  # by the chain before them, sorted by their tokens

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.free - self.idle

    @property
    def available(self) -> int:
        """Blocks that can be had without taking one from a sequence."""
        return self.free + self.idle

    def missing(self, sequence: Sequence, length: int) -> int:
        """Blocks that a sequence lacks to hold so many positions."""
        return max(0, -(-length // self.size) - len(sequence.blocks))

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Give a sequence room for so many positions; false, and nothing happens, where blocks do not suffice."""
        missing = self.missing(sequence, length)
        if missing > self.available:
            return False
        sequence.blocks += [self._allocate() for _ in range(missing)]
        return True

    def attach(self, sequence: Sequence) -> None:
        """Give a sequence without blocks what the cache holds of its context, all but the last token at most: that is
        computed anew, for its logits."""
        sequence.attached = True
        self.looked_up_tokens += len(sequence.tokens) - 1
        blocks, chain, partial = self._match(sequence)
        for block in blocks:
            self._reference(block)
        sequence.blocks, sequence.chain = blocks, chain
        while self._below is not None and self._restore(sequence):
            partial = self._next_match(sequence)
        sequence.cached = len(blocks) * self.size
        if partial is not None:
            source, length = partial
            self._idle.pop(source, None)  # not the one to be evicted for its own copy
            if self.available:
                target = self._allocate()
                self._copy(source, target)
                sequence.blocks.append(target)
                sequence.cached += length
            if not self.references[source]:
                self._idle[source] = None
        sequence.verified = sequence.cached
        self.hit_tokens += sequence.cached

    def _restore(self, sequence: Sequence) -> bool:
        """Put the next block of a context into the cache, where it is below; then those after it that are here."""
        before, own = self.next_block(sequence)
        if len(own) < self.size or (len(sequence.chain) + 1) * self.size >= len(sequence.tokens) or not self.available:
            return False
        digest, block = _digest(before, own), self._allocate()
        sequence.blocks.append(block)
        if not self._below.restore(digest, block):  # type: ignore[union-attr]
            sequence.blocks.pop()
            self.references[block] = 0
            self._free.append(block)
            return False
        self.restored_tokens += self.size
        self._register(block, before, own)
        sequence.chain.append(digest)
        return True

    def _next_match(self, sequence: Sequence) -> tuple[int, int] | None:
        """Extend a context's blocks by full ones that are here; then one that agrees in part, as `_match`."""
        limit = len(sequence.tokens) - 1
        while True:
            before, own = self.next_block(sequence)
            begin = len(sequence.chain) * self.size
            length, block = self._longest_match(before, own[: max(0, limit - begin)])
            if length < self.size:
                return (block, length) if length >= max(1, self.size // 4) else None
            self._reference(block)
            sequence.blocks.append(block)
            sequence.chain.append(_digest(before, own))

    def held(self) -> list[tuple[bytes, int]]:
        """All full blocks that can be found, by the digests of their chains."""
        found = ((_digest(before, own), block) for block, (before, own) in self._content.items())
        whole = {block for block, (_, own) in self._content.items() if len(own) == self.size}
        return [(digest, block) for digest, block in found if block in whole]

    def lookup(self, sequence: Sequence) -> tuple[int, int, tuple[bytes, tuple[int, ...]] | None]:
        """What attaching would find: the numbers of full blocks that sequences reference and of full blocks that are
        idle; and the first block it would lack, by chain and tokens, where its tokens fill it."""
        blocks, chain, _ = self._match(sequence)
        referenced = sum(self.references[block] > 0 for block in blocks)
        begin = len(blocks) * self.size
        own = tuple(sequence.tokens[begin : begin + self.size])
        following = (chain[-1] if chain else sequence.root, own) if len(own) == self.size else None
        return referenced, len(blocks) - referenced, following

    def next_block(self, sequence: Sequence) -> tuple[bytes, tuple[int, ...]]:
        """The block that a sequence is writing, as `lookup` names it."""
        begin = len(sequence.chain) * self.size
        return (sequence.chain[-1] if sequence.chain else sequence.root), tuple(
            sequence.tokens[begin : begin + self.size]
        )

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """Let others find the blocks that a sequence has filled, as far as they are verified."""
        while (len(sequence.chain) + 1) * self.size <= sequence.verified:
            before, tokens = self.next_block(sequence)
            self._register(sequence.blocks[len(sequence.chain)], before, tokens)
            sequence.chain.append(_digest(before, tokens))

    def release(self, sequence: Sequence, failed: bool = False) -> None:
        """Take a sequence's blocks back. What they hold stays to be found until their room is needed, but for what is
        not verified; failed: a pass that wrote to them went wrong."""
        self.cache_full_blocks(sequence)
        whole = len(sequence.chain)
        if failed or sequence.verified < sequence.cached:
            if whole < len(sequence.blocks):
                self._clear(sequence.blocks[whole:])
        else:
            before, tokens = self.next_block(sequence)
            tokens = tokens[: sequence.cached - whole * self.size]
            if tokens:
                self._register(sequence.blocks[whole], before, tokens)
        for block in reversed(sequence.blocks):  # a block is of no use without those before it: it goes first
            self.references[block] -= 1
            if not self.references[block]:
                if block in self._content:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        sequence.blocks, sequence.chain, sequence.attached = [], [], False
        sequence.cached = sequence.verified = 0
        sequence.lives += 1

    def _match(self, sequence: Sequence) -> tuple[list[int], list[bytes], tuple[int, int] | None]:
        """Full blocks that hold the front of a context, their chain, and (block, length) of one that agrees in part."""
        tokens = sequence.tokens
        blocks: list[int] = []
        chain: list[bytes] = []
        before, limit = sequence.root, len(tokens) - 1
        while True:
            begin = len(blocks) * self.size
            own = tuple(tokens[begin : min(begin + self.size, limit)])
            length, block = self._longest_match(before, own)
            if length < self.size:
                # less is sooner computed than copied
                return blocks, chain, (block, length) if length >= max(1, self.size // 4) else None
            before = _digest(before, own)
            blocks.append(block)
            chain.append(before)

    def _longest_match(self, before: bytes, own: tuple[int, ...]) -> tuple[int, int]:
        """How many tokens of `own` a block after that chain holds at most, and which. Among sorted neighbours the most
        alike stand next to where `own` belongs."""
        children = self._children.get(before, [])
        place = bisect_left(children, (own, -1))
        return max(
            ((_common(own, content), block) for content, block in children[max(0, place - 1) : place + 1]),
            default=(0, 0),
        )

    def _register(self, block: int, before: bytes, tokens: tuple[int, ...]) -> None:
        if self.share and block not in self._content and self._longest_match(before, tokens)[0] < len(tokens):
            self._content[block] = (before, tokens)
            insort(self._children.setdefault(before, []), (tokens, block))

    def _unregister(self, block: int) -> None:
        before, tokens = self._content.pop(block)
        children = self._children[before]
        children.pop(bisect_left(children, (tokens, block)))
        if not children:
            del self._children[before]

    def _reference(self, block: int) -> None:
        self._idle.pop(block, None)
        self.references[block] += 1

    def _allocate(self) -> int:
        """A block to write in. The caller has seen that there is one."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            before, own = self._content[block]
            if self._below is not None and len(own) == self.size:
                self._below.keep(_digest(before, own), block)
            del self._idle[block]
            self._unregister(block)
            self.evictions += 1
        self.references[block] = 1
        return block


def root_of(salt: bytes, adapter: str = "") -> bytes:
    """Where the chains of requests of a salt and an adapter begin: what one adapter computes is of no use to others."""
    if adapter:
        salt = blake2b(adapter.encode(), digest_size=16, person=b"adapter").digest() + salt
        return blake2b(salt, digest_size=16, person=b"adapted").digest()
    return blake2b(salt, digest_size=16, person=b"root").digest() if salt else b""


def _digest(before: bytes, tokens: tuple[int, ...]) -> bytes:
    return blake2b(before + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=16).digest()


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the common front."""
    if one == other[: len(one)]:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
