"""Weights into a Transformer: whole or a shard of them, in the dtype asked for, a chunk of a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from calumma.model.config import FILE, ModelConfig
from calumma.model.ops.int8 import Int8Linear, quantize
from calumma.model.transformer import Transformer
from calumma.model.weights import LazyTensor, open_weights, sliced

Slices = Callable[[str, ModelConfig], tuple[slice, ...]]


def whole(name: str, config: ModelConfig) -> tuple[slice, ...]:
    """All of a weight."""
    return ()


def read_transformer(
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    int8: bool = False,
    slices: Slices = whole,
    context: int | None = None,
) -> Transformer:
    """The Transformer of a model directory, with its weights, or what `slices` leaves of them. dtype: None keeps the
    stored one. int8: the blocks' matrices in 8 bits, for inference alone; embedding, norms and output projection in
    `dtype` all the same. context: a shorter one than the model's.

    What memory is needed is that of the weights as asked for, and CHUNK_BYTES. Raises what `open_weights` does, and
    ValueError where other weights are found than its configuration describes.
    """
    config = with_context(ModelConfig.read(directory), context)
    transformer = described(config, int8)
    with torch.device("meta"):
        stored = dict(Transformer(config).named_parameters())
    entries = open_weights(directory)
    if stored.keys() != entries.keys():
        wrong = ", ".join(sorted(stored.keys() ^ entries.keys())[:20])
        raise ValueError(f"{directory} does not hold the weights its {FILE} describes: {wrong}")
    for name, entry in entries.items():
        if entry.shape != tuple(stored[name].shape):
            raise ValueError(
                f"{directory}: {name} is {list(entry.shape)}, and its {FILE} describes {list(stored[name].shape)}"
            )
        path, _, attribute = name.rpartition(".")
        module, where = transformer.get_submodule(path), slices(name, config)
        if isinstance(module, Int8Linear) and attribute == "weight":
            _read_int8(module, entry, device, where)
        else:
            weight = entry.load(device, dtype, where)
            setattr(module, attribute, nn.Parameter(weight, weight.is_floating_point()))
    transformer.tie()
    transformer.rebuild_rope(device)
    return transformer


def with_context(config: ModelConfig, context: int | None) -> ModelConfig:
    """The configuration with a shorter context. Raises ValueError where it is longer."""
    if context is None:
        return config
    if not 2 <= context <= config.context:
        raise ValueError(f"context {context} must lie in 2..{config.context}, the model's")
    return config.model_copy(update={"context": context})


def described(config: ModelConfig, int8: bool = False) -> Transformer:
    """The Transformer of a configuration, without memory for its weights."""
    with torch.device("meta"):
        transformer = Transformer(config)
        for block in transformer.blocks if int8 else ():
            for module in block.children():
                for name, layer in list(module.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(module, name, Int8Linear(layer.in_features, layer.out_features, layer.bias is not None))
    return transformer


def _read_int8(module: Int8Linear, entry: LazyTensor, device: torch.device | str, where: tuple[slice, ...]) -> None:
    outputs, inputs = sliced(entry.shape, where)
    values_OI = torch.empty(outputs, inputs, dtype=torch.int8, device=device)
    scale_O = torch.empty(outputs, device=device)
    for rows, chunk in entry.chunks(where, 3 * torch.float32.itemsize):
        values_OI[rows], scale_O[rows] = quantize(chunk)
    module.weight = nn.Parameter(values_OI, requires_grad=False)
    module.scale = nn.Parameter(scale_O, requires_grad=False)
