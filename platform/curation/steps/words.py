"""Words of a text, and hashes of runs of them: what texts are compared by, whatever their case and punctuation."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from calumma.model.document import Document, Image, Text

# Scripts written without spaces: every character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses no bit

Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def all_text(document: Document) -> str:
    """All that a document says: its texts, and the captions of images that no text segment repeats."""
    texts = {s.text for s in document.segments if isinstance(s, Text)}
    parts = [
        s.text if isinstance(s, Text) else s.caption
        for s in document.segments
        if isinstance(s, Text) or (isinstance(s, Image) and s.caption and s.caption not in texts)
    ]
    return "\n".join(part for part in parts if part)


def is_pair(document: Document) -> bool:
    """Whether it is one image with a caption or without, before the two are put in order."""
    first = document.segments[0] if len(document.segments) == 1 else None
    return isinstance(first, Image) and first.role is None


def hashes(items: Iterable[str | bytes]) -> Hashes:
    """64 bits of every item, the same in every process."""
    known: dict[str | bytes, bytes] = {}
    digests: list[bytes] = []
    for item in items:
        digest = known.get(item)
        if digest is None:
            data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
            digest = known[item] = hashlib.blake2b(data, digest_size=8).digest()
        digests.append(digest)
    return np.frombuffer(b"".join(digests), np.uint64)


def ngrams(hashed: Hashes, length: int) -> Hashes:
    """Hashes of all runs of `length` items, in order; none when there are fewer items."""
    count = len(hashed) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(length):
        total = total * _BASE + hashed[offset : offset + count]
    return mix_bits(total)


def mix_bits(values: Hashes) -> Hashes:
    """A bijection of 64 bits after which any of them can stand for all (the finalizer of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def hash_fraction(seed: int, parts: Sequence[bytes]) -> float:
    """A number in [0, 1) that content and seed decide."""
    digest = hashlib.sha256(f"{seed}\0".encode() + b"\0".join(parts)).digest()
    return int.from_bytes(digest[:8]) / 2**64
