"""What conftest.py does for tests that fork."""

from __future__ import annotations

import gc
import os


class Collected:
    """Garbage that only the collector finds, and that says in whose process it did."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.itself = descriptor, self

    def __del__(self) -> None:
        os.write(self.descriptor, f"{os.getpid()}\n".encode())


def test_a_forked_child_collects_nothing_of_its_parent() -> None:
    read, write = os.pipe()
    Collected(write)
    child = os.fork()
    if child == 0:
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    gc.collect()
    os.close(write)
    with os.fdopen(read) as told:
        assert told.read().split() == [str(os.getpid())]
