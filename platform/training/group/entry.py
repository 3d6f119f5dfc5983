"""What a worker's process runs first: a watchdog, and under it everything else, from the loop's imports on.

The loop and what it is given travel as bytes, so that reading them, and with it the import of torch, of DeepSpeed and
of our own code, is watched too. This module imports nothing heavy.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.standby.leaving import leave_group

WATCHDOG = "watchdog"  # key of the watchdog in what a loop is given


def watched(
    loop: Callable[[dict[str, Any]], Any], limit: float, stacks: str, used_again: bool = False
) -> Callable[[dict[str, Any]], Any]:
    """The same loop, ended on a worker where nothing goes on for `limit` seconds; stack traces go to the folder
    `stacks`. It is given `{"payload": packed(config)}`, and hands the loop its watchdog besides. `used_again`: a
    process whose loop has failed may run it again, in another group."""
    packed_loop = packed(loop)

    def run(config: dict[str, Any]) -> Any:
        from calumma.platform.training.group.entry import run_packed

        return run_packed(packed_loop, config["payload"], limit, stacks, used_again)

    return run


def packed(value: Any) -> bytes:
    """As bytes, functions and classes by their names where they have one."""
    import ray.cloudpickle

    data: bytes = ray.cloudpickle.dumps(value)
    return data


@contextmanager
def watchdog_of(config: dict[str, Any], limit: float, stacks: str) -> Iterator[Watchdog]:
    """The watchdog that a loop was given; one of its own where it runs without a group."""
    if WATCHDOG in config:
        yield config[WATCHDOG]
        return
    dog = Watchdog(limit, lambda text: keep_stacks(stacks, dog.place, text))
    try:
        yield dog
    finally:
        dog.close()


def run_packed(packed_loop: bytes, payload: bytes, limit: float, stacks: str, used_again: bool = False) -> Any:
    dog = Watchdog(limit, lambda text: keep_stacks(stacks, dog.place, text))
    try:
        dog.enter("importing")
        loop, config = pickle.loads(packed_loop), pickle.loads(payload)
        dog.enter("starting")
        return loop({**config, WATCHDOG: dog})
    except BaseException as error:
        if used_again:
            dog.enter("leaving the group")
            leave_group(error)
        raise
    finally:
        dog.close()


def keep_stacks(folder: str, place: str, text: str) -> None:
    """Stack traces of this worker, in a file that says when, where in its work, and whose they are. Raises
    StorageError."""
    from calumma.platform import storage

    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    name = f"{now}-{place.replace(' ', '-')}-worker-{_rank():05d}.txt"
    storage.write_bytes(storage.join(folder, name), text.encode())


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0
