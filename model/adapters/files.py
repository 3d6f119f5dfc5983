"""Adapters in folders as PEFT reads and writes them: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint. Tensors are called
`base_model.model.<layer>.lora_A.weight` [R, I], `….lora_B.weight` [O, R] and `….lora_magnitude_vector` [O]; what was
trained as a whole has its own name behind `base_model.model.`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calumma.model.adapters.names import is_hugging_face, of_hugging_face
from calumma.model.config import ModelConfig
from calumma.model.convert.names import shapes
from calumma.model.convert.publish import atomic_folder
from calumma.model.ops.adapter import Adapter, LayerAdapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
FOLDER = "adapter"  # of a training's output
PREFIX = "base_model.model."
PARTS = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}
# `default` is the name that an adapter has within PEFT, which some programs leave in.
TENSOR = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?")
REFUSED = {"fan_in_fan_out": False, "lora_bias": False, "bias": "none", "layer_replication": None}


class AdapterError(ValueError):
    """A folder holds no adapter that can be used here; the message says what was found."""


def adapter_folder(directory: Path) -> Path:
    """The folder itself, or that of a training's output. Raises AdapterError where neither holds an adapter."""
    for folder in (directory, directory / FOLDER):
        if (folder / CONFIG).is_file():
            return folder
    if (directory / WEIGHTS).is_file():
        raise AdapterError(f"{directory} has {WEIGHTS} and no {CONFIG}, which says how much it counts")
    raise AdapterError(f"{directory} holds no adapter: there is no {CONFIG}")


def read_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """An adapter for a model of this shape, in our names, whichever of the two it is stored in. Raises AdapterError."""
    folder = adapter_folder(Path(directory))
    settings = _settings(folder)
    try:
        found = _layers(folder, settings)
        ours = of_hugging_face(found, config) if is_hugging_face(found) else found
        ours.require_fit(shapes(config), str(folder))
    except AdapterError:
        raise
    except ValueError as error:
        raise AdapterError(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}") from error
    return ours


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise AdapterError(f"{folder / CONFIG}: peft_type is {kind!r}; low-rank adapters alone are read, 'LORA'")
    for name, usual in REFUSED.items():
        if settings.get(name) not in (usual, None):
            raise AdapterError(f"{folder / CONFIG}: {name} is {settings[name]!r}; only {usual!r} is read")
    return settings


def _layers(folder: Path, settings: Mapping[str, Any]) -> Adapter:
    tensors = _read(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise AdapterError(f"{folder / WEIGHTS}: {name} does not begin with {PREFIX}, as PEFT's tensors do")
        own = name.removeprefix(PREFIX)
        if match := TENSOR.fullmatch(own):
            parts.setdefault(match["layer"], {})[match["part"]] = tensor
        elif "lora_" in own:
            raise AdapterError(f"{folder / WEIGHTS}: {own} is not of a linear layer; others are not read")
        else:
            whole[own.replace("modules_to_save.", "")] = tensor
    layers = {}
    for layer, found in parts.items():
        if lost := [part for part in ("lora_A", "lora_B") if part not in found]:
            raise AdapterError(f"{folder / WEIGHTS}: {layer} has no {lost[0]}")
        rank = len(found["lora_A"])
        alpha = float(_pattern(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8)))
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        magnitude = found.get("lora_magnitude_vector")
        if bool(settings.get("use_dora")) != (magnitude is not None):
            raise AdapterError(f"{folder}: use_dora is {settings.get('use_dora')!r}, and {layer} does not agree")
        layers[layer] = LayerAdapter(
            found["lora_A"], found["lora_B"], alpha / divisor, None if magnitude is None else magnitude.flatten()
        )
    if not layers and not whole:
        raise AdapterError(f"{folder / WEIGHTS} is empty")
    return Adapter(layers, whole)


def _read(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        more = f"; {PICKLED} is not read: load it with PEFT and save it again" if (folder / PICKLED).is_file() else ""
        raise AdapterError(f"{folder} has no {WEIGHTS}{more}")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error


def _pattern(patterns: Mapping[str, Any] | None, layer: str, usual: Any) -> Any:
    """PEFT's way: the first pattern that is the name's end, after a dot, or matches it there."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return usual


def write_adapter(
    directory: str | Path,
    adapter: Adapter,
    base: str | None = None,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
) -> None:
    """Write the folder, which must not be there. base: what it was trained on, for whoever reads the configuration.
    Raises ConversionError."""
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.down_RI
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.up_OR
        if layer.magnitude_O is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude_O
    tensors |= {f"{PREFIX}{name}": weight for name, weight in adapter.whole.items()}
    with atomic_folder(directory) as folder:
        settings = config_json(adapter, base, dropout, rank_stabilized)
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def config_json(adapter: Adapter, base: str | None, dropout: float, rank_stabilized: bool) -> dict[str, Any]:
    """adapter_config.json. Ranks and scales that differ between layers stand in patterns."""

    def alpha(layer: LayerAdapter) -> float:
        return layer.scale * (math.sqrt(layer.rank) if rank_stabilized else layer.rank)

    layers = dict(adapter.layers)
    usual = next(iter(layers.values()), None)
    rank, scale = (usual.rank, alpha(usual)) if usual else (8, 8.0)
    others = {name: layer for name, layer in layers.items() if layer.rank != rank}
    scaled = {name: layer for name, layer in layers.items() if not math.isclose(alpha(layer), scale)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(scale, 6),
        "lora_dropout": dropout,
        "use_rslora": rank_stabilized,
        "use_dora": any(layer.magnitude_O is not None for layer in layers.values()),
        "target_modules": list(layers),
        "rank_pattern": {re.escape(name): layer.rank for name, layer in others.items()},
        "alpha_pattern": {re.escape(name): round(alpha(layer), 6) for name, layer in scaled.items()},
        "modules_to_save": [name.removesuffix(".weight") for name in adapter.whole] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
