"""GPUs as their makers' data sheets describe them: what a run is planned with, and its speed measured against.

Sources: NVIDIA's data sheets of B200 (DGX B200), H200, H100, A100, L40S, L4, A10, and of the GeForce series; AMD's of
MI300X. Matrix products are dense, without the doubling that the sheets print for sparsity. Links are what one GPU sends
in one direction, half of what the sheets add up: NVLink or Infinity Fabric, else PCI Express 4.0 with 16 lanes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PCIE = 32e9


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    memory: float
    """Bytes."""
    bfloat16: float
    """FLOP/s of matrix products."""
    float32: float
    """The same as PyTorch computes it by default, without TF32."""
    bandwidth: float
    """Bytes a second of its own memory."""
    link: float = _PCIE
    """Bytes a second that it sends to the other GPUs of its machine."""
    float8: float | None = None
    """FLOP/s of matrix products; none where the hardware has no such."""


GB = 1e9
# The first name that is part of the device's, as CUDA tells it, decides.
GPUS: dict[str, Gpu] = {
    "B200": Gpu(180 * GB, 2250e12, 75e12, 7.7e12, 900e9, 4500e12),
    "H200": Gpu(141 * GB, 989e12, 67e12, 4.8e12, 450e9, 1979e12),
    "H100 PCIe": Gpu(80 * GB, 756e12, 51e12, 2.0e12, _PCIE, 1513e12),
    "H100 NVL": Gpu(94 * GB, 835e12, 60e12, 3.9e12, 300e9, 1671e12),
    "H100": Gpu(80 * GB, 989e12, 67e12, 3.35e12, 450e9, 1979e12),
    "A100-SXM4-40GB": Gpu(40 * GB, 312e12, 19.5e12, 1.555e12, 300e9),
    "A100": Gpu(80 * GB, 312e12, 19.5e12, 2.039e12, 300e9),
    "A10G": Gpu(24 * GB, 70e12, 35e12, 0.6e12),
    "A10": Gpu(24 * GB, 125e12, 31.2e12, 0.6e12),
    "L40S": Gpu(48 * GB, 362e12, 91.6e12, 0.864e12, float8=733e12),
    "L4": Gpu(24 * GB, 121e12, 30.3e12, 0.3e12, float8=242e12),
    "RTX 4090": Gpu(24 * GB, 165e12, 82.6e12, 1.008e12, float8=330e12),
    "RTX 3090": Gpu(24 * GB, 71e12, 35.6e12, 0.936e12),
    "MI300X": Gpu(192 * GB, 1307e12, 163e12, 5.3e12, 448e9, 2614e12),
}


def find_gpu(device_name: str) -> tuple[str, Gpu] | None:
    """The kind that a device, or a person, names; None for one without an entry."""
    found = (name for name in GPUS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE))
    name = next(found, None)
    return None if name is None else (name, GPUS[name])
