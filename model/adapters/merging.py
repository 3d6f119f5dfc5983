"""A model directory with an adapter merged into its weights, tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

from calumma.model.adapters.files import read_adapter
from calumma.model.config import ModelConfig
from calumma.model.convert.names import ConversionError, Progress
from calumma.model.convert.publish import atomic_folder
from calumma.model.directory import missing_files
from calumma.model.weights import FILE, INDEX, SHARD_BYTES, LazyTensor, open_weights, write_weights


def merge_directory(
    model: str | Path,
    adapter: str | Path,
    destination: str | Path,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a model directory whose weights are the model's with the adapter in them; weights keep their dtype. Raises
    ConversionError, AdapterError."""
    model = Path(model)
    if missing := missing_files(lambda name: (model / name).is_file()):
        raise ConversionError(f"{model} is not a whole model directory: {', '.join(missing)} missing")
    found = read_adapter(adapter, ModelConfig.read(model))
    weights = open_weights(model)

    def merged(name: str, entry: LazyTensor) -> LazyTensor:
        layer = found.layers.get(name.removesuffix(".weight"))
        if name in found.whole:
            return LazyTensor.of(found.whole[name].to(entry.dtype))
        if layer is None:
            return entry
        return LazyTensor(entry.shape, entry.dtype, lambda: layer.merged(entry.read()))

    with atomic_folder(destination) as folder:
        shutil.copytree(
            model, folder, dirs_exist_ok=True,
            ignore=lambda place, names: [n for n in names if Path(place) == model and _is_weight(n)],
        )  # fmt: skip
        write_weights(folder, {name: merged(name, entry) for name, entry in weights.items()}, shard_bytes, progress)


def _is_weight(name: str) -> bool:
    """Whether a file holds weights, or a manifest tells of them."""
    return name in (FILE, INDEX, "manifest.json") or (name.startswith("model-") and name.endswith(".safetensors"))
