"""A sequence as the cache sees it: its tokens and the blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """A context in the cache: its tokens, the first `cached` of which are written in its blocks.

    root: what its chain of digests begins with; sequences of different roots find nothing of each other.
    verified: the first so many of them are known to be numbers. lives: how often its blocks were taken from it.
    charged: so many of them its tenant has been charged for, once, however often they are computed.
    adapter: the number of the adapter that computes it, 0 for the plain model.
    """

    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)  # digests of its full, written blocks, in order
    attached: bool = False  # whether it has been looked up in what the cache holds
    verified: int = 0
    lives: int = 0
    charged: int = 0
    root: bytes = b""
    adapter: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are not written yet."""
        return len(self.tokens) - self.cached
