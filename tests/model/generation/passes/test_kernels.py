"""How many kernels a layer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calumma.model.generation.attention.native import NativeReader
from calumma.model.generation.cache.paged import PagedCache
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.layout import BatchLayout
from calumma.model.transformer import Transformer

MOST = 12


class Dispatched(TorchDispatchMode):
    """Counts what PyTorch computes: neither views nor memory that is only taken."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        viewed = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if not viewed and not name.startswith(("empty", "new_empty")):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def kernels(transformer: Transformer, choice: Any) -> Counter[str]:
    """Of a pass in which two sequences have a token each."""
    decoder = Decoder(transformer, kernels=choice)
    native, cache = decoder.operations.native, PagedCache(transformer.config, 4, 16)
    reader = None if native is None else NativeReader(native)
    pairs = [(Sequence([1] * 20, 19, [0, 1]), 1), (Sequence([1] * 30, 29, [2, 3]), 1)]
    layout = BatchLayout(pairs, 16)
    paged = layout.step(cache, 0, torch.device("cpu"), reader=reader)
    with Dispatched() as dispatched:
        decoder.hidden(torch.tensor(layout.tokens), paged)
    ours = 0 if native is None else native.calls
    return dispatched.found + Counter(ours=ours)


@pytest.mark.parametrize("choice", ["native", "torch"])
def test_a_layer_is_a_dozen_kernels(make_transformer: Callable[..., Transformer], choice: str) -> None:
    """Of ours; and of PyTorch's, one by one, hardly more than twice that, of which torch.compile makes fewer on a GPU
    (test_fused.py)."""
    few, many = (kernels(make_transformer(30, layers=layers), choice) for layers in (2, 5))
    per_layer = {name: (many[name] - few[name]) / 3 for name in many if many[name] > few[name]}
    print(choice, per_layer)
    assert sum(per_layer.values()) <= (MOST if choice == "native" else 26), per_layer
