"""What a device has, what of it is free, and how much of it an engine may fill."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

GIGABYTE = 1e9


class DeviceMemory(Protocol):
    """Memory of a device, in bytes."""

    @property
    def total(self) -> int: ...

    def free(self) -> int:
        """What nobody holds now; a process's allocator gives back what it only keeps."""
        ...

    def peak(self, work: Callable[[], object]) -> int | None:
        """What a call takes at most, beyond what is held before; None where that cannot be told."""
        ...


class CudaMemory:
    """Of a GPU."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    @property
    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak(self, work: Callable[[], object]) -> int | None:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device) - before)


class HostMemory:
    """Of this machine, or of the container (cgroup v2)."""

    @property
    def total(self) -> int:
        return min([_meminfo("MemTotal"), *_cgroup("memory.max")])

    def free(self) -> int:
        limits = [limit - used for limit, used in zip(_cgroup("memory.max"), _cgroup("memory.current"), strict=False)]
        return max(0, min([_meminfo("MemAvailable"), *limits]))

    def peak(self, work: Callable[[], object]) -> int | None:
        return None


@dataclass(frozen=True)
class MemoryBudget:
    """How much of a device an engine may fill. share: of the device, by all together who are to be on it. part: of that
    share, this engine's. alone: nobody else is to be there but with this engine, and whatever is there counts; else
    `reserved` bytes do, of its part, for what is not the engine's own. most: positions of the cache that are of use."""

    device: DeviceMemory
    share: float = 0.9
    part: float = 1.0
    alone: bool = True
    reserved: int = 0
    most: int | None = None

    def left(self, held: int) -> int:
        """Bytes that may still be filled by an engine that holds some."""
        total, free = self.device.total, self.device.free()
        own = int(total * self.share * self.part)
        return own - (total - free) if self.alone else min(own - held - self.reserved, free)


def gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.1f} GB" if abs(count) >= 0.05 * GIGABYTE else f"{1000 * count / GIGABYTE:.1f} MB"


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # no Linux: all that the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _cgroup(name: str) -> list[int]:
    """Of this container, where there is a number."""
    with suppress(OSError, ValueError):
        return [int(Path("/sys/fs/cgroup", name).read_text())]
    return []
