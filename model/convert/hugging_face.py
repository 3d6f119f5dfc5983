"""Hugging Face's Chameleon directories: config.json, safetensors, tokenizer.json (transformers, models/chameleon)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.convert import image_tokenizer, text
from calumma.model.convert.folders import require_head, require_weights
from calumma.model.convert.names import (
    ConversionError,
    Progress,
    Row,
    require_names,
    require_same,
    require_shapes,
    rows,
    shapes,
    to_halves,
    to_pairs,
)
from calumma.model.convert.publish import atomic_folder
from calumma.model.directory import IMAGE_TOKENIZER, missing_files
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import SHARD_BYTES, LazyTensor, Weights, open_weights, write_weights

# Fields whose other values no model of ours can have, with transformers' defaults, and its defaults of the rest.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "swin_norm": False,
}


def import_hugging_face(
    source: str | Path,
    destination: str | Path,
    vqgan: str | Path | None = None,
    vqgan_settings: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> bool:
    """Write a model directory from a Hugging Face one. Weights keep their dtype. Whether it can draw images.

    The decoder of images, which transformers leaves out and Anole puts into `model.vqmodel`, comes from Meta's
    `vqgan.ckpt` (`vqgan`) with its `vqgan.yaml`, read into a dictionary (`vqgan_settings`), where it is not there;
    so does the whole image tokenizer of a checkpoint without. Without a decoder the model reads images and cannot draw
    them. Raises ConversionError.
    """
    source = Path(source)
    require_weights(source)
    settings = {**DEFAULTS, **FIXED, **text.read_json(source / "config.json")}
    config = config_of(settings, str(source / "config.json"))
    weights = open_source(source)
    require_head(source, weights)
    of_images = {name: entry for name, entry in weights.items() if name.startswith(image_tokenizer.HUGGING_FACE_PREFIX)}
    of_text = {name: entry for name, entry in weights.items() if name not in of_images}
    transformer = to_ours(of_text, config, str(source))
    image_config, images = _image_tokenizer(source, settings, of_images, vqgan, vqgan_settings or {})
    with atomic_folder(destination) as folder:
        vocabulary = text.import_tokenizer(source / "tokenizer.json", config.vocabulary_size, folder)
        image_tokenizer.require_codes(str(source), vocabulary, image_config)
        config.save(folder)
        image_tokenizer.write_image_tokenizer(image_config, images, folder / IMAGE_TOKENIZER)
        write_weights(folder, transformer, shard_bytes, progress)
    return image_config.decoder


def _image_tokenizer(
    source: Path,
    settings: Mapping[str, Any],
    weights: dict[str, LazyTensor],
    vqgan: str | Path | None,
    vqgan_settings: Mapping[str, Any],
) -> tuple[ImageTokenizerConfig, Weights]:
    """Of the folder, of Meta's checkpoint, or of both."""
    if not weights:
        if vqgan is None:
            raise ConversionError(
                f"{source} has no image tokenizer ({image_tokenizer.HUGGING_FACE_PREFIX}...): give Meta's vqgan.ckpt, "
                "or its folder, by --vqgan"
            )
        return image_tokenizer.open_vqgan(Path(vqgan), vqgan_settings)
    config = image_tokenizer.of_hugging_face(settings.get("vq_config") or {}, f"{source / 'config.json'}: vq_config")
    decodes = any(name.startswith(f"{image_tokenizer.HUGGING_FACE_PREFIX}decoder.") for name in weights)
    config = config.model_copy(update={"decoder": decodes})
    table = image_tokenizer.hugging_face_names(config, decodes)
    images = image_tokenizer.renamed(weights, table, config, str(source))
    return (config, images) if vqgan is None else _with_decoder(images, config, Path(vqgan), vqgan_settings)


def _with_decoder(
    images: Weights, config: ImageTokenizerConfig, checkpoint: Path, settings: Mapping[str, Any]
) -> tuple[ImageTokenizerConfig, Weights]:
    """The whole image tokenizer of Meta's checkpoint, when it is the one whose encoder was given."""
    found_config, found = image_tokenizer.open_vqgan(checkpoint, settings)
    if found_config.model_copy(update={"decoder": config.decoder}) != config:
        raise ConversionError(
            f"{checkpoint} is of another shape than the image tokenizer it should complete: it is {found_config!r}, "
            f"that is {config!r}"
        )
    for name, entry in images.items():
        if not torch.equal(found[name].read().to(entry.dtype), entry.read()):
            raise ConversionError(f"{checkpoint} is not the image tokenizer of this model: {name} differs")
    return found_config, found


def export_hugging_face(
    source: str | Path, destination: str | Path, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write a directory that `ChameleonForConditionalGeneration.from_pretrained` loads, with its tokenizer and
    processor. Weights keep their dtype; the decoder of images has no place in it. Raises ConversionError."""
    source = Path(source)
    if missing := missing_files(lambda name: (source / name).is_file()):
        raise ConversionError(f"{source} is not a whole model directory: {', '.join(missing)} missing")
    config, vocabulary = ModelConfig.read(source), Vocabulary.read(source)
    _require_chameleon(config, source)
    image_config = ImageTokenizerConfig.read(source / IMAGE_TOKENIZER)
    vq_config = image_tokenizer.to_hugging_face(image_config, str(source / IMAGE_TOKENIZER))
    weights = open_source(source)
    table = image_tokenizer.hugging_face_names(image_config)
    images = open_source(source / IMAGE_TOKENIZER)
    require_names(str(source / IMAGE_TOKENIZER), images, image_tokenizer.meta_names(image_config))
    theirs = to_theirs(weights, config, str(source)) | {name: images[ours] for ours, name in table.items()}
    tokenizer = text.export_tokenizer(source)
    ids = text.names(tokenizer)
    dtype = weights["embedding.weight"].dtype
    with atomic_folder(destination) as folder:
        files = {
            "config.json": config_json(config, vocabulary, vq_config, ids, dtype),
            "generation_config.json": special_ids(vocabulary),
            "tokenizer.json": tokenizer,
            **processor_files(config, image_config),
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_weights(folder, theirs, shard_bytes, progress)


# What transformers' Chameleon has, of the settings that text models may have otherwise.
CHAMELEON = {
    "query_key_norm": True,
    "own_head_size": None,
    "rope_scaling": None,
    "query_key_value_bias": False,
    "attention_output_bias": False,
    "feed_forward_bias": False,
    "tied": False,
}


def _require_chameleon(config: ModelConfig, source: Path) -> None:
    other = {name: getattr(config, name) for name, value in CHAMELEON.items() if getattr(config, name) != value}
    if other:
        found = ", ".join(f"{name} {value!r}" for name, value in other.items())
        raise ConversionError(
            f"{source}: transformers has no Chameleon with {found}, as this model has, which "
            "was made from a text model; it can be served and trained with calumma alone"
        )


def open_source(directory: Path) -> dict[str, LazyTensor]:
    try:
        return open_weights(directory)
    except (OSError, ValueError) as error:
        raise ConversionError(str(error)) from error


def config_of(settings: Mapping[str, Any], where: str) -> ModelConfig:
    """Our configuration for a Hugging Face config.json. Raises ConversionError."""
    if settings.get("model_type") in TEXT_MODELS:
        raise ConversionError(
            f"{where}: model_type {settings['model_type']!r} is a text model: `calumma extend hf` makes it mixed-modal"
        )
    if settings.get("tie_word_embeddings"):
        raise ConversionError(
            f"{where}: tie_word_embeddings true: Chameleon's output projection is not its embedding. If lm_head.weight "
            "is in the weights, set it to false; else save the model anew with an lm_head of its own"
        )
    require_same(where, settings, {"model_type": "chameleon", **FIXED})
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require_same(where, {"rope_type": kind}, {"rope_type": "default"})
    try:
        return ModelConfig(
            vocabulary_size=settings["vocab_size"],
            layers=settings["num_hidden_layers"],
            width=settings["hidden_size"],
            heads=settings["num_attention_heads"],
            kv_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
            ffn_width=settings["intermediate_size"],
            context=settings["max_position_embeddings"],
            norm_order="swin" if settings["swin_norm"] else "pre",
            norm_eps=settings["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0,
        )
    except ValidationError as error:
        raise ConversionError(f"{where}: a model that cannot be: {error}") from error


def config_json(
    config: ModelConfig, vocabulary: Vocabulary, vq_config: dict[str, Any], ids: dict[str, int], dtype: torch.dtype
) -> dict[str, Any]:
    """A Hugging Face config.json, for transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        **FIXED,
        **special_ids(vocabulary),
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "swin_norm": config.norm_order == "swin",
        "vq_config": vq_config,
        "vocabulary_map": ids,
    }


def special_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    return {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}


def processor_files(config: ModelConfig, images: ImageTokenizerConfig) -> dict[str, dict[str, Any]]:
    """What ChameleonProcessor.from_pretrained reads: of the tokenizer, of images, of both."""
    size = images.resolution
    special = {f"{kind}_token": text.SPECIALS[name] for kind, name in TOKENIZER_NAMES.items()}
    image_processor = {
        "image_processor_type": "ChameleonImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 1,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "do_normalize": True,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
    }
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "ChameleonProcessor",
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
            **special,
        },
        "preprocessor_config.json": {"processor_class": "ChameleonProcessor", **image_processor},
        "processor_config.json": {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": images.codes_per_image,
            "image_token": text.PLACEHOLDER,
            "image_processor": image_processor,
        },
    }


# transformers' kind of a special token -> our name of it; its processor ends a turn with the separator.
TOKENIZER_NAMES = {"bos": "bos", "eos": "eos", "pad": "pad", "sep": "end_turn"}


def to_ours(weights: Weights, config: ModelConfig, where: str) -> dict[str, LazyTensor]:
    """Our names and order for the Transformer's tensors of a Hugging Face directory. Raises ConversionError."""
    table = rows(config)
    require_names(where, weights, [row.hugging_face for row in table])
    entries = {row.ours: _reordered(weights[row.hugging_face], row, config, ours=True) for row in table}
    expected = shapes(config)
    require_shapes(where, entries, expected)
    return {name: entries[name] for name in expected}  # in the order in which training writes them


def to_theirs(weights: Weights, config: ModelConfig, where: str) -> dict[str, LazyTensor]:
    """The inverse of `to_ours`."""
    table = rows(config)
    require_names(where, weights, [row.ours for row in table])
    require_shapes(where, weights, shapes(config))
    return {row.hugging_face: _reordered(weights[row.ours], row, config, ours=False) for row in table}


def _reordered(entry: LazyTensor, row: Row, config: ModelConfig, ours: bool) -> LazyTensor:
    if row.rotary is None:
        return entry
    heads, order = 1 if row.rotary == "one" else getattr(config, row.rotary), to_pairs if ours else to_halves
    return LazyTensor(entry.shape, entry.dtype, lambda: order(entry.read(), heads, config.head_size))
