"""One line of Ray's core that frightens and means nothing here is kept from the terminal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

NOTICE = b"has constructor arguments in the object store and max_restarts > 0"
STDERR = 2  # the file descriptor: Ray's core is C++ and does not write through sys.stderr
NOWHERE = "0" * 56  # the id of a node that no cluster has


class _Unplaced:
    def __init__(self, argument: None) -> None: ...


def hold_back_restart_notice() -> None:
    """Before a pool of Ray Data's actors starts: let Ray's core say now, unheard, what it says once in a process.

    It reports as an error that an actor which may be restarted was given references to objects, without which it could
    not restart. All actors of Ray Data are made so, and their pool holds these objects as long as it lives. No setting
    silences that line alone (ray-project/ray#53727, #57733): therefore an actor that no node takes provokes it here.
    Does nothing for a driver connected by ray://, whose core runs elsewhere.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.util.client.ray.is_connected():
        return
    actor = ray.remote(_Unplaced).options(
        num_cpus=0, max_restarts=1, scheduling_strategy=NodeAffinitySchedulingStrategy(NOWHERE, soft=False)
    )
    with without_lines(NOTICE):
        actor.remote(ray.put(None))


@contextmanager
def without_lines(words: bytes) -> Iterator[None]:
    """What the block writes to standard error, by whatever means, comes out at its end, but for lines with `words`."""
    with tempfile.TemporaryFile() as held:
        own = os.dup(STDERR)
        os.dup2(held.fileno(), STDERR)
        try:
            yield
        finally:
            os.dup2(own, STDERR)
            os.close(own)
            held.seek(0)
            os.write(STDERR, b"".join(line for line in held if words not in line))
