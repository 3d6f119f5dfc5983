"""Adapters under Hugging Face's names of Chameleon's layers, and back to ours.

Hugging Face has the rows of queries and keys in another order (convert/names.py): of an adapter the rows of `up`, and
of magnitudes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.convert.names import Row, rows, to_halves, to_pairs
from calumma.model.ops.adapter import Adapter, LayerAdapter

LANGUAGE_MODEL = re.compile(r"\b(language_model|text_model)\.")  # of layouts that have the decoder inside a module


def is_hugging_face(adapter: Adapter) -> bool:
    """Whether its names are Hugging Face's."""
    return any(".layers." in f".{name}" for name in adapter.layers) or "lm_head.weight" in adapter.whole


def to_hugging_face(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Our names to theirs. Raises ValueError on a name that has no counterpart."""
    table = {row.ours: row for row in rows(config)}
    return _renamed(adapter, table, lambda row: row.hugging_face, to_halves, config)


def of_hugging_face(adapter: Adapter, config: ModelConfig) -> Adapter:
    """Their names to ours. Raises ValueError on a name that has no counterpart."""
    plain = Adapter(
        {LANGUAGE_MODEL.sub("", name): layer for name, layer in adapter.layers.items()},
        {LANGUAGE_MODEL.sub("", name): weight for name, weight in adapter.whole.items()},
    )
    table = {row.hugging_face: row for row in rows(config)}
    return _renamed(plain, table, lambda row: row.ours, to_pairs, config)


def _renamed(
    adapter: Adapter,
    table: dict[str, Row],
    target: Callable[[Row], str],
    reorder: Callable[[Tensor, int, int], Tensor],
    config: ModelConfig,
) -> Adapter:
    def row_of(name: str) -> Row:
        if name not in table:
            raise ValueError(f"the adapter is of {name.removesuffix('.weight')}, which calumma's models have not")
        return table[name]

    def reordered(row: Row, weight: Tensor) -> Tensor:
        return weight if row.rotary is None else reorder(weight, getattr(config, row.rotary), config.head_size)

    layers: dict[str, LayerAdapter] = {}
    for name, layer in adapter.layers.items():
        row = row_of(f"{name}.weight")
        magnitude_O = None if layer.magnitude_O is None else reordered(row, layer.magnitude_O)
        layers[target(row).removesuffix(".weight")] = replace(
            layer, up_OR=reordered(row, layer.up_OR), magnitude_O=magnitude_O
        )
    whole = {target(row := row_of(name)): reordered(row, weight) for name, weight in adapter.whole.items()}
    return Adapter(layers, whole)
