"""PyTorch's own checkpoint files, mapped and not read: a tensor comes from disk when it is used."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from calumma.model.convert.names import ConversionError


def open_checkpoint(path: Path) -> dict[str, Any]:
    """What torch.save wrote, on the CPU, and nothing but data (`weights_only`): no code of the file is run.

    Files of PyTorch before 1.6, which cannot be mapped, are read whole. Raises ConversionError.
    """
    if not path.is_file():
        raise ConversionError(f"{path.parent} has no {path.name}")
    try:
        mapped = zipped(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConversionError(f"{path} is not a checkpoint that can be read safely: {error}") from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}, and not tensors by name")
    return loaded


def zipped(path: Path) -> bool:
    """Whether a file is in torch.save's present format, a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
