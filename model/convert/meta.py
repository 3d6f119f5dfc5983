"""Meta's release: `consolidated.pth` or the shards `consolidated.0N.pth` of any model-parallel size, params.json and
consolidate_params.json; text_tokenizer.json, vqgan.ckpt and vqgan.yaml in a folder of their own
(facebookresearch/chameleon, chameleon/inference/loader.py).

A model trained on N GPUs comes in N shards. They are put together here, tensor by tensor, on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from calumma.model.config import ModelConfig
from calumma.model.convert import image_tokenizer, text
from calumma.model.convert.names import (
    FUSED,
    ConversionError,
    Progress,
    Row,
    require_names,
    require_shapes,
    rows,
    shapes,
)
from calumma.model.convert.publish import atomic_folder
from calumma.model.convert.pytorch import open_checkpoint
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.weights import SHARD_BYTES, LazyTensor, write_weights

CONTEXT = 4096  # positions the release was trained with; params.json does not say
TOKENIZER_FILES = ("text_tokenizer.json", "vqgan.ckpt", "vqgan.yaml")
SHARD = re.compile(r"consolidated\.(\d+)\.pth")

Shards = Sequence[Mapping[str, Tensor]]


def import_meta(
    source: str | Path,
    destination: str | Path,
    tokenizer: str | Path,
    vqgan_settings: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a model directory from a folder of the release's weights and the folder of its tokenizers.

    `vqgan_settings` is its `vqgan.yaml`, read into a dictionary. Weights keep their dtype. Raises ConversionError.
    """
    source, tokenizer = Path(source), Path(tokenizer)
    params = read_params(source)
    shards = open_shards(source, params.get("consolidated_shards"))
    config = config_of(params, shards, source)
    transformer = merged(shards, config, source)
    image_config, images = image_tokenizer.open_vqgan(tokenizer / "vqgan.ckpt", vqgan_settings)
    with atomic_folder(destination) as folder:
        vocabulary = text.import_tokenizer(tokenizer / "text_tokenizer.json", config.vocabulary_size, folder)
        image_tokenizer.require_codes(str(tokenizer), vocabulary, image_config)
        config.save(folder)
        image_tokenizer.write_image_tokenizer(image_config, images, folder / IMAGE_TOKENIZER)
        write_weights(folder, transformer, shard_bytes, progress)


def tokenizer_folder(source: str | Path) -> Path:
    """Where the release's tokenizers are: with the weights, below them, or as its download puts them, DATA/tokenizer
    for DATA/models/7b. Raises ConversionError that says where it looked."""
    source = Path(source)
    places = [source, source / "tokenizer", source.resolve().parents[1] / "tokenizer"]
    for place in places:
        if (place / TOKENIZER_FILES[0]).is_file():
            return place
    raise ConversionError(f"no {TOKENIZER_FILES[0]} in {', '.join(map(str, places))}; name its folder by --tokenizer")


def read_params(source: Path) -> dict[str, Any]:
    """params.json, what it says of the model, and over both consolidate_params.json, as Meta's loader reads them; the
    shard count that the last one gives, if any, is `consolidated_shards`."""
    params = text.read_json(source / "params.json")
    final = source / "consolidate_params.json"
    consolidated = text.read_json(final) if final.is_file() else {}
    shards = (
        {"consolidated_shards": consolidated["model_parallel_size"]} if "model_parallel_size" in consolidated else {}
    )
    return {**params, **(params.get("model") or {}), **consolidated, **shards}


def open_shards(source: Path, expected: int | None) -> list[dict[str, Tensor]]:
    """The shards in order, their tensors still on disk. Raises ConversionError when one is missing or unlike others."""
    if (source / "consolidated.pth").is_file():
        paths = [source / "consolidated.pth"]
    else:
        found = {int(match[1]): path for path in source.glob("*.pth") if (match := SHARD.fullmatch(path.name))}
        if not found:
            raise ConversionError(f"{source} has neither consolidated.pth nor consolidated.00.pth")
        count = expected or max(found) + 1
        missing = [f"consolidated.{rank:02d}.pth" for rank in range(max(count, max(found) + 1)) if rank not in found]
        if missing:
            raise ConversionError(f"{source}: {', '.join(missing)} missing")
        paths = [found[rank] for rank in sorted(found)]
    if expected is not None and len(paths) != expected:
        raise ConversionError(
            f"{source}: consolidate_params.json says {expected} shards, and there are {len(paths)}: "
            f"{', '.join(path.name for path in paths)}"
        )
    shards = [open_checkpoint(path) for path in paths]
    for path, shard in zip(paths[1:], shards[1:], strict=True):
        require_names(f"{path}, beside {paths[0].name}", shard, [*shards[0]])
    return shards


def config_of(params: Mapping[str, Any], shards: Shards, source: Path) -> ModelConfig:
    """Our configuration; the vocabulary and the feed-forward width are those of the tensors. Raises ConversionError."""
    embedding, gate = shards[0].get("tok_embeddings.weight"), shards[0].get("layers.0.feed_forward.w2.weight")
    if embedding is None or gate is None:
        raise ConversionError(f"{source}: no tok_embeddings.weight or layers.0.feed_forward.w2.weight: not a Chameleon")
    try:
        return ModelConfig(
            vocabulary_size=embedding.shape[0],
            layers=params["n_layers"],
            width=params["dim"],
            heads=params["n_heads"],
            kv_heads=params.get("n_kv_heads") or params["n_heads"],
            ffn_width=gate.shape[1] * len(shards),
            context=CONTEXT,
            query_key_norm=params.get("qk_normalization", False),
            norm_order="swin" if params.get("swin_norm", False) else "pre",
            norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=params.get("rope_theta", 10_000.0),
        )
    except KeyError as error:
        raise ConversionError(f"{source}: params.json says no {error.args[0]}") from error
    except ValidationError as error:
        raise ConversionError(f"{source}: a model that cannot be: {error}") from error


def merged(shards: Shards, config: ModelConfig, source: Path) -> dict[str, LazyTensor]:
    """Our tensors, each put together from all shards when it is read. Raises ConversionError."""
    for heads in (config.heads, config.kv_heads):
        if heads % len(shards):
            raise ConversionError(f"{source}: {heads} heads cannot lie in {len(shards)} shards")
    table = rows(config)
    split = [_unfused(shard, config, len(shards)) for shard in shards]
    require_names(str(source), split[0], [row.meta for row in table])
    entries = {row.ours: _entry(row, [shard[row.meta] for shard in split], config) for row in table}
    expected = shapes(config)
    require_shapes(str(source), entries, expected)
    return {name: entries[name] for name in expected}  # in the order in which training writes them


def _unfused(shard: Mapping[str, Tensor], config: ModelConfig, count: int) -> dict[str, Tensor]:
    """A shard with its fused matrices taken apart; nothing is read yet."""
    queries, keys = (heads // count * config.head_size for heads in (config.heads, config.kv_heads))
    parts: dict[str, Tensor] = dict(shard)
    for layer in range(config.layers):
        for fused, names in FUSED.items():
            if (tensor := parts.pop(fused.format(layer), None)) is None:
                continue
            sizes = [queries, keys, keys] if len(names) == 3 else [tensor.shape[0] // 2] * 2
            if sum(sizes) != tensor.shape[0]:
                raise ConversionError(f"{fused.format(layer)}: {tensor.shape[0]} rows instead of {sum(sizes)}")
            pieces = zip(names, tensor.split(sizes), strict=True)
            parts |= {name.format(layer): piece for name, piece in pieces}
    return parts


def _entry(row: Row, parts: list[Tensor], config: ModelConfig) -> LazyTensor:
    shape = list(parts[0].shape)
    if row.shards in ("rows", "columns"):
        dimension = 0 if row.shards == "rows" else 1
        shape[dimension] = sum(part.shape[dimension] for part in parts)
        return LazyTensor(tuple(shape), parts[0].dtype, lambda: torch.cat(parts, dimension))
    if row.shards == "heads":
        heads = getattr(config, row.rotary or "heads")
        return LazyTensor(
            (heads, *shape), parts[0].dtype, lambda: torch.stack(parts).repeat_interleave(heads // len(parts), 0)
        )
    return LazyTensor(tuple(shape), parts[0].dtype, lambda: _one(parts))


def _one(copies: list[Tensor]) -> Tensor:
    """A tensor of which every shard has a copy: their mean, should training have let them drift apart."""
    same = all(torch.equal(copies[0], copy) for copy in copies[1:])
    return copies[0] if same else torch.stack(copies).mean(0)
