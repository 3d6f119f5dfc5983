"""How much memory `benchmarks/data.py` takes over time, and the chart of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path


def memory(read: Callable[[], object]) -> list[tuple[float, float]]:
    """(seconds, MB) of this process and all it has started while `read` runs; memory that they share counts once,
    where it was allocated (USS)."""
    import psutil

    seen: list[tuple[float, float]] = []
    stop = threading.Event()
    began = time.monotonic()

    def sample() -> None:
        us = psutil.Process()
        running = True
        while running:
            running = not stop.wait(0.1)
            total = 0
            for process in [us, *us.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().uss
            seen.append((time.monotonic() - began, total / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        read()
    finally:
        stop.set()
        thread.join()
    return seen


def chart(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot([t for t, _ in curve], [mb for _, mb in curve], label=name)
    axes.set(xlabel="seconds of streaming", ylabel="MB, all processes", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)
