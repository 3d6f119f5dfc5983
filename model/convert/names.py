"""The Transformer's tensors in the three layouts, as one table.

Ours and Meta's rotate the pairs (2i, 2i+1) of a head, Hugging Face's rotates (i, i + half): there the rows of queries
and keys, and the query-key norms, stand evens before odds within each head. Meta's shards, one a GPU of the training
group, hold rows or columns of a matrix, a copy of the norms, and each its own query-key norm, which its heads share
(facebookresearch/chameleon, chameleon/inference/transformer.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.weights import Weights

# progress(bytes done, bytes in all, name of the tensor)
Progress = Callable[[float, float, str], object]

LISTED = 40  # names in an error message; of the others it gives the number


class ConversionError(ValueError):
    """A model cannot be converted; the message says what was found, what is missing, and what to do."""


@dataclass(frozen=True)
class Row:
    """One tensor; `{}` stands for the layer. `rotary`: whose heads Hugging Face reorders; `one` for all heads."""

    ours: str
    hugging_face: str
    meta: str
    shards: Literal["rows", "columns", "copies", "heads"]
    rotary: Literal["heads", "kv_heads", "one"] | None = None

    def of_layer(self, layer: int) -> Row:
        ours, hugging_face, meta = (name.format(layer) for name in (self.ours, self.hugging_face, self.meta))
        return replace(self, ours=ours, hugging_face=hugging_face, meta=meta)


A, F = "blocks.{}.attention", "blocks.{}.feed_forward"
HA, HF = "model.layers.{}.self_attn", "model.layers.{}.mlp"
MA, MF = "layers.{}.attention", "layers.{}.feed_forward"
TABLE = (
    Row("embedding.weight", "model.embed_tokens.weight", "tok_embeddings.weight", "columns"),
    Row("norm.weight", "model.norm.weight", "norm.weight", "copies"),
    Row("output.weight", "lm_head.weight", "output.weight", "rows"),
    Row(f"{A}.query.weight", f"{HA}.q_proj.weight", f"{MA}.wq.weight", "rows", "heads"),
    Row(f"{A}.key.weight", f"{HA}.k_proj.weight", f"{MA}.wk.weight", "rows", "kv_heads"),
    Row(f"{A}.value.weight", f"{HA}.v_proj.weight", f"{MA}.wv.weight", "rows"),
    Row(f"{A}.output.weight", f"{HA}.o_proj.weight", f"{MA}.wo.weight", "columns"),
    Row(f"{A}.query_norm.weight", f"{HA}.q_norm.weight", f"{MA}.q_normalization.weight", "heads", "heads"),
    Row(f"{A}.query_norm.bias", f"{HA}.q_norm.bias", f"{MA}.q_normalization.bias", "heads", "heads"),
    Row(f"{A}.key_norm.weight", f"{HA}.k_norm.weight", f"{MA}.k_normalization.weight", "heads", "kv_heads"),
    Row(f"{A}.key_norm.bias", f"{HA}.k_norm.bias", f"{MA}.k_normalization.bias", "heads", "kv_heads"),
    Row(f"{F}.gate.weight", f"{HF}.gate_proj.weight", f"{MF}.w1.weight", "rows"),
    Row(f"{F}.up.weight", f"{HF}.up_proj.weight", f"{MF}.w3.weight", "rows"),
    Row(f"{F}.down.weight", f"{HF}.down_proj.weight", f"{MF}.w2.weight", "columns"),
    Row(
        "blocks.{}.attention_norm.weight",
        "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention_norm.weight",
        "copies",
    ),
    Row(
        "blocks.{}.feed_forward_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.ffn_norm.weight",
        "copies",
    ),
)
BIASES = {  # which projections have one is a setting of the model
    "query_key_value_bias": (
        Row(f"{A}.query.bias", f"{HA}.q_proj.bias", f"{MA}.wq.bias", "rows", "heads"),
        Row(f"{A}.key.bias", f"{HA}.k_proj.bias", f"{MA}.wk.bias", "rows", "kv_heads"),
        Row(f"{A}.value.bias", f"{HA}.v_proj.bias", f"{MA}.wv.bias", "rows"),
    ),
    "attention_output_bias": (Row(f"{A}.output.bias", f"{HA}.o_proj.bias", f"{MA}.wo.bias", "copies"),),
    "feed_forward_bias": (
        Row(f"{F}.gate.bias", f"{HF}.gate_proj.bias", f"{MF}.w1.bias", "rows"),
        Row(f"{F}.up.bias", f"{HF}.up_proj.bias", f"{MF}.w3.bias", "rows"),
        Row(f"{F}.down.bias", f"{HF}.down_proj.bias", f"{MF}.w2.bias", "copies"),
    ),
}
# Meta's fused matrices: the rows of these, one after the other, within each shard.
FUSED = {
    f"{MA}.wqkv.weight": (f"{MA}.wq.weight", f"{MA}.wk.weight", f"{MA}.wv.weight"),
    f"{MF}.w13.weight": (f"{MF}.w1.weight", f"{MF}.w3.weight"),
}
# Tables of rotary frequencies, which are computed and not learned.
IGNORED = re.compile(r"rope\.freqs|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def rows(config: ModelConfig) -> list[Row]:
    """The table for a model: its layers one by one, with the norms and biases that it has."""
    kept = [row for row in TABLE if row.shards != "heads" or config.query_key_norm is True]
    if config.query_key_norm == "rms":
        norms = [row for row in TABLE if row.shards == "heads" and row.ours.endswith(".weight")]
        kept += [replace(row, shards="copies", rotary="one") for row in norms]
    if config.tied:
        kept = [row for row in kept if row.ours != "output.weight"]
    kept += [row for field, biases in BIASES.items() if getattr(config, field) for row in biases]
    inside = [row for row in kept if "{}" in row.ours]
    outside = [row for row in kept if "{}" not in row.ours]
    return outside + [row.of_layer(layer) for layer in range(config.layers) for row in inside]


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names of our tensors and their shapes; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def to_pairs(x: Tensor, heads: int, head_size: int) -> Tensor:
    """Hugging Face's order of each head's rows, or of a query-key norm [heads, head size], to ours: 0, half, 1, ..."""
    return x.reshape(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(x.shape)


def to_halves(x: Tensor, heads: int, head_size: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return x.reshape(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(x.shape)


def require_same(where: str, found: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ConversionError that lists the fields whose value is not the one that this architecture has."""
    wrong = [
        f"{field} {found.get(field)!r} (only {value!r})" for field, value in fixed.items() if found.get(field) != value
    ]
    if wrong:
        raise ConversionError(f"{where}: not an architecture that calumma has: {abridged(wrong)}")


def require_names(where: str, found: Iterable[str], wanted: Collection[str]) -> None:
    """Raises ConversionError that lists the names that are missing, and those that are unknown."""
    found = set(found)
    unknown = sorted(name for name in found.difference(wanted) if not IGNORED.fullmatch(name))
    missing = sorted(set(wanted) - found)
    if unknown or missing:
        kinds = [("missing", missing), ("unknown", unknown)]
        found_wrong = "; ".join(f"{len(names)} {kind}: {abridged(names)}" for kind, names in kinds if names)
        raise ConversionError(f"{where}: the tensors are not those of this architecture; {found_wrong}")


def require_shapes(where: str, found: Weights, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ConversionError that lists the tensors of another shape than expected."""
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise ConversionError(f"{where}: shapes that its configuration does not give: {abridged(wrong)}")


def abridged(names: list[str]) -> str:
    """Names for an error message: all, or the first and how many more there are."""
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"
