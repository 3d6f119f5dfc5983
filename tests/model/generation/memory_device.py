"""A device with so much memory and no more, that counts every tensor made while it is entered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class CountedDevice(TorchDispatchMode):
    """A `DeviceMemory`. Tensors of before count with `hold`. Raises torch.OutOfMemoryError when it is full."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total, self.used, self.most = total, 0, 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(made))
        return made

    def hold(self, values: list[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor) or value.device.type == "meta":
                continue
            storage = value.untyped_storage()
            if storage in self._known:
                continue
            size = storage.nbytes()
            self._known[storage] = size
            self.used += size
            self.most = max(self.most, self.used)
            finalize(storage, self._give_back, size)
            if self.used > self._total:
                raise torch.OutOfMemoryError(f"{self.used} bytes of {self._total}")

    def _give_back(self, size: int) -> None:
        self.used -= size

    @property
    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self.used

    def peak(self, work: Callable[[], object]) -> int | None:
        before, self.most = self.used, self.used
        work()
        return self.most - before
