"""The C library's heap: what is freed goes back to the system at once while a model is built, and stays for the next
step while it is trained.

glibc raises the size from which an allocation is a mapping of its own, up to 32 MiB, with the largest that is freed;
what is smaller then comes from heaps, one for each few threads, of which only the end is given back. Layers that are
made whole and cut up, and what is read by many threads, leave such heaps behind. See mallopt(3).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_OWN_MAPPING = 256 << 10  # bytes from which on an allocation is one while a model is built
_LARGEST = 32 << 20  # glibc's own limit for both on 64 bits, where training's buffers bring it anyway


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Within it what is freed is not kept; where the C library is not glibc nothing is changed."""
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
    try:
        yield
    finally:
        library.malloc_trim(0)
        kept_for_the_next_step()


def kept_for_the_next_step() -> None:
    """From now on: a step's buffers are taken and freed all the time, and each would cost its pages anew."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
