"""The codecs by name, and which of them a file is packed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calumma.platform.sources.compression import codecs, zips
from calumma.platform.sources.compression.codecs import ZSTD, ZSTD_SKIPPED, Source

SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2", ".zip": "zip"}
ARCHIVES = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".txz": ".tar.xz", ".tbz2": ".tar.bz2", ".tbz": ".tar.bz2"}


@dataclass(frozen=True)
class Codec:
    """`ends`: how what stands behind all members begins, where something does. `unread`: the name of the member that
    begins here, if it is none of those wanted in a file of some name."""

    magic: bytes
    member: Callable[[Source], Iterator[bytes]]
    ends: tuple[bytes, ...] = ()
    unread: Callable[[Source, str], str | None] = lambda source, name: None

    def starts(self, head: bytes) -> bool:
        return head.startswith(self.magic) or (
            self.magic == ZSTD and head[1:4] == ZSTD_SKIPPED[1:] and head[:1] != b"" and head[0] & 0xF0 == 0x50
        )

    def almost_starts(self, head: bytes) -> bool:
        """Whether all of the first bytes but one are those of a member."""
        equal = sum(a == b for a, b in zip(head, self.magic, strict=False))
        return equal == len(self.magic) - 1


CODECS = {
    "gzip": Codec(b"\x1f\x8b\x08", codecs.gzip),
    "zstd": Codec(ZSTD, codecs.zstd),
    "xz": Codec(b"\xfd7zXZ\x00", codecs.xz),
    "bzip2": Codec(b"BZh", codecs.bzip2),
    "zip": Codec(zips.LOCAL, zips.member, zips.ENDS, zips.unread),
}


def codec_of(head: bytes, uri: str) -> str | None:
    """The codec that a file's first bytes, or else its name, tell."""
    by_name = SUFFIXES.get(next((suffix for suffix in SUFFIXES if plain_archive(uri).endswith(suffix)), ""))
    by_content = (name for name, codec in CODECS.items() if codec.starts(head) and _sure(name, head))
    return next(by_content, by_name)


def _sure(name: str, head: bytes) -> bool:
    return name != "bzip2" or head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")  # three letters may begin a text


def plain_archive(uri: str) -> str:
    """A name in lower case, with the suffixes of a packed archive in full: `.tgz` is `.tar.gz`."""
    name = uri.lower()
    return next((name.removesuffix(short) + long for short, long in ARCHIVES.items() if name.endswith(short)), name)
