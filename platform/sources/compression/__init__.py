"""Compressed files: gzip, zstd, xz, bzip2 and zip, decompressed a little at a time, and what damage leaves of them."""

from calumma.platform.sources.compression.stream import Damaged, DecompressedStream
from calumma.platform.sources.compression.table import ARCHIVES, SUFFIXES, codec_of, plain_archive

__all__ = ["ARCHIVES", "SUFFIXES", "Damaged", "DecompressedStream", "codec_of", "plain_archive"]
