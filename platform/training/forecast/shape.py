"""The Transformer's sizes from its configuration alone: parameters, arithmetic, activations.

Bytes of activations are those that autograd keeps of `TransformerBlock.forward` outside the compiler; a compiled block
keeps less. Shape letters as in model/transformer.py: D width, N heads, K key-value heads, H head size, F, V, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from calumma.model.config import ModelConfig

if TYPE_CHECKING:
    from calumma.platform.training.specification import TrainSpecification

_IMAGE_ROWS = 8192  # of `trainable: image_head` or `image_rows`, where the vocabulary is not at hand


def block_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name below `blocks.N.` -> (rows, columns) of each matrix of a block."""
    D, F = config.width, config.ffn_width
    NH, KH = config.heads * config.head_size, config.kv_heads * config.head_size
    return {
        "attention.query": (NH, D),
        "attention.key": (KH, D),
        "attention.value": (KH, D),
        "attention.output": (D, NH),
        "feed_forward.gate": (F, D),
        "feed_forward.up": (F, D),
        "feed_forward.down": (D, F),
    }


def _block_vectors(config: ModelConfig) -> dict[str, int]:
    """Norms and biases."""
    found = {"attention_norm.weight": config.width, "feed_forward_norm.weight": config.width}
    for name, heads in (("query", config.heads), ("key", config.kv_heads)):
        if config.query_key_norm == "rms":
            found[f"attention.{name}_norm.weight"] = config.head_size
        elif config.query_key_norm:
            found |= {f"attention.{name}_norm.{part}": heads * config.head_size for part in ("weight", "bias")}
    for name, (rows, _) in block_matrices(config).items():
        biased = config.feed_forward_bias if name.startswith("feed_forward") else config.query_key_value_bias
        if config.attention_output_bias if name == "attention.output" else biased:
            found[f"{name}.bias"] = rows
    return found


def parameters(config: ModelConfig) -> dict[str, int]:
    """Elements of every parameter, by name."""
    sizes = {"embedding.weight": config.vocabulary_size * config.width}
    for layer in range(config.layers):
        sizes |= {f"blocks.{layer}.{k}.weight": a * b for k, (a, b) in block_matrices(config).items()}
        sizes |= {f"blocks.{layer}.{name}": size for name, size in _block_vectors(config).items()}
    sizes["norm.weight"] = config.width
    return sizes if config.tied else sizes | {"output.weight": config.vocabulary_size * config.width}


@dataclass(frozen=True)
class Sizes:
    """Of one model."""

    total: int
    trained: int
    added: int
    """Of `trained`: adapters, which are no part of the model's own."""
    largest: int
    """The largest module, which ZeRO 3 gathers whole."""
    quantized: int = 0
    """Of `total`: frozen weights in few bits, which ZeRO does not divide."""

    @classmethod
    def of(cls, config: ModelConfig, spec: TrainSpecification) -> Sizes:
        sizes, names = parameters(config), spec.trainable_names
        total, added, trained = sum(sizes.values()), 0, 0
        if spec.lora is not None:
            for layer in range(config.layers):
                for name, (rows, columns) in block_matrices(config).items():
                    if any(fnmatchcase(f"blocks.{layer}.{name}", target) for target in spec.lora.targets):
                        added += spec.lora.rank * (rows + columns)
        if "all" in names:
            trained = total
        else:
            trained = sum(size for name, size in sizes.items() if any(fnmatchcase(name, part) for part in names))
            if "image_head" in names or "image_rows" in names:
                matrices = 1 if "image_head" in names or config.tied else 2
                trained += matrices * min(_IMAGE_ROWS, config.vocabulary_size) * config.width
        if spec.lora is None or spec.lora.quantize is None:
            return cls(total, trained + added, added, max(sizes.values()))
        kept = [name for name in sizes if _is_frozen_matrix(name, config, names)]
        largest = max(size for name, size in sizes.items() if name not in kept)
        return cls(total, trained + added, added, largest, sum(sizes[name] for name in kept))


def _is_frozen_matrix(name: str, config: ModelConfig, trained: list[str]) -> bool:
    matrix = name.partition(".")[2].partition(".")[2].removesuffix(".weight")
    return (
        matrix in block_matrices(config)
        and name.endswith(".weight")
        and not any(fnmatchcase(name, pattern) for pattern in trained)
    )


def quantized_bytes(config: ModelConfig, bits: int, element: int, elements: int) -> float:
    """Bytes of frozen weights in few bits (trainable/quantized.py), scales too: in 4 bits one of 8 bits for 64 weights,
    and for 256 of these one of their own; in 8 bits a float32 for every output channel."""
    if bits == 4:
        return elements * (0.5 + 1 / 64 + element / (64 * 256))
    rows, numbers = (sum(size) for size in zip(*((r, r * c) for r, c in block_matrices(config).values()), strict=True))
    return elements * (1 + 4 * rows / numbers)


def dequantizing_bytes(config: ModelConfig, bits: int, element: int) -> int:
    """Bytes of the largest quantized matrix while a product brings it back: the matrix, and on the way to it, in 4
    bits, an index of 8 bytes and two numbers for each of its own."""
    return max(r * c for r, c in block_matrices(config).values()) * (element + (8 + 2 * element if bits == 4 else 4))


def flops_per_token(config: ModelConfig, recompute: bool = False) -> float:
    """Of training on one token, forward and backward: 2 a weight and pass, the embedding none, attention over the whole
    context without a discount for its mask; with `recompute` the blocks' forward pass a second time."""
    block = sum(rows * columns for rows, columns in block_matrices(config).values())
    attention = 2 * config.heads * config.head_size * config.context
    forward = config.layers * 2 * (block + attention)
    output = 2 * config.vocabulary_size * config.width
    return 3 * (forward + output) + (forward if recompute else 0)


def block_bytes(config: ModelConfig, element: int) -> int:
    """Bytes that autograd keeps of a block for each token. `element`: bytes of an activation."""
    D, NH, KH = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
    norms = 2 * (8 * D + 4)  # the input and the scaled input in float32, and the scale
    inputs = 2 * element * D  # of query, key and value; of gate and up
    attention = element * (2 * NH + 2 * KH) + 4 * config.heads  # q, k, v, the result; log-sum-exp
    if config.query_key_norm == "rms":  # as of the other norms
        attention += 8 * (NH + KH) + 4 * (config.heads + config.kv_heads)
    elif config.query_key_norm:  # before and after the scaling to 1; mean and scale
        attention += element * 2 * (NH + KH) + element * 2 * (config.heads + config.kv_heads)
    feed_forward = element * 4 * config.ffn_width  # gate, up, SiLU of gate, product
    dropped = 2 * element * D if config.dropout else 0
    return norms + inputs + attention + feed_forward + dropped


def shared_bytes(config: ModelConfig, element: int) -> int:
    """What autograd keeps besides where workers share rows: attention's result twice, of some heads of all tokens and
    of all heads of some."""
    return element * config.heads * config.head_size


def input_bytes(config: ModelConfig, element: int) -> int:
    """Bytes of a block's input for each token: all that recomputation keeps of it."""
    return element * config.width


def product_bytes(config: ModelConfig, element: int) -> int:
    """Bytes for each token of a block's input and of the results of its matrix products and of attention: what
    selective recomputation keeps."""
    D, NH, KH = config.width, config.heads * config.head_size, config.kv_heads * config.head_size
    return element * (3 * D + 2 * NH + 2 * KH + 2 * config.ffn_width) + 4 * config.heads


def backward_bytes(config: ModelConfig, element: int) -> int:
    """Bytes for each token that the backward pass of a block works on beside what is kept: gradients of the hidden
    layer."""
    return 3 * element * config.ffn_width


def loss_bytes(config: ModelConfig, element: int, tokens: int, chunk_bytes: int) -> int:
    """Bytes of the last norm and the loss of a pass (model/ops/loss.py): states and their gradient, a chunk of logits,
    in float32 too, the weight's gradient, in float32 where there is more than one chunk."""
    D, V = config.width, config.vocabulary_size
    chunk = max(1, chunk_bytes // (V * element))
    logits = min(chunk, tokens) * V * (element + (4 if element < 4 else 0))
    gradient = V * D * (element if tokens <= chunk or element == 4 else 4 + element)
    return tokens * (8 * D + 2 * element * D) + logits + gradient
