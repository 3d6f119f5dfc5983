"""Compiles kernels.cpp and what it includes, once for a machine's kind of processor, and opens it.

What is compiled lies below `$XDG_CACHE_HOME/calumma/kernels`, named by all that it depends on: source, compiler, flags,
the processor's instructions. Who compiles holds a lock of the kernel's (flock), which ends with the process however it
ends, and puts the file in place when it is whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
PATIENCE = 600.0  # seconds of a compiler on a machine with much else to do


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None, with one line in the log, where there is no compiler or it fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.info("no C++ compiler: the CPU's kernels are PyTorch's")
        return None
    try:
        return ctypes.CDLL(str(compiled(compiler, folder())))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        log.warning(
            "the CPU's kernels are PyTorch's: %s could not compile ours: %s %s", compiler, error, output.decode()
        )
        return None


def folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "calumma" / "kernels"


def compiled(compiler: str, below: Path) -> Path:
    """The file of the compiled kernels, made if it isn't there. Raises OSError and subprocess.SubprocessError."""
    target = below / f"{_key(compiler)}.so"
    if target.is_file():
        return target
    below.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (below / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():  # another process was first
            return target
        with tempfile.TemporaryDirectory(dir=below) as made:
            file = Path(made) / "kernels.so"
            command = [compiler, *FLAGS, "-o", str(file), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
            file.replace(target)
    return target


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    sources = [each.read_bytes() for each in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, version, " ".join(FLAGS).encode(), platform.machine().encode(), _instructions()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _instructions() -> bytes:
    """What the processor can do, as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
