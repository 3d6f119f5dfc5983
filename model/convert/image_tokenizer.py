"""Names of the image tokenizer's weights: ours, Meta's (`vqgan.ckpt`, key `state_dict`) and Hugging Face's.

Tensors are the same in all three; only names differ, and Hugging Face holds no decoder (Anole's folders do).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from calumma.model.config import ImageTokenizerConfig
from calumma.model.convert.names import ConversionError, require_names, require_same, require_shapes
from calumma.model.convert.pytorch import open_checkpoint
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, Weights, write_weights

HUGGING_FACE_PREFIX = "model.vqmodel."
# Ours -> VQGAN's; every other name is the same.
RENAMED = {"codebook.weight": "quantize.embedding.weight"}
# What Meta's checkpoint may hold besides: the losses that trained it (discriminator and perceptual network).
META_IGNORED_PREFIXES = ("loss.",)
NORM_GROUPS = 32  # of every GroupNorm there
# Fields whose other values no image tokenizer of ours can have, and transformers' defaults of the rest.
VQGAN_FIXED = {"double_z": False, "in_channels": 3, "out_ch": 3, "tanh_out": False, "resamp_with_conv": True}
HUGGING_FACE_FIXED = {"double_latent": False, "in_channels": 3}
HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    **HUGGING_FACE_FIXED,
    "resolution": 512,
    "num_embeddings": 8192,
    "embed_dim": 256,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": None,
    "attn_type": "vanilla",
}


def meta_names(config: ImageTokenizerConfig) -> dict[str, str]:
    """Our name -> the name in Meta's `vqgan.ckpt`, for every weight that a tokenizer of this shape has."""
    with torch.device("meta"):
        ours = ImageTokenizer(config).state_dict()
    return {name: RENAMED.get(name, name) for name in ours}


def hugging_face_names(config: ImageTokenizerConfig, decoder: bool = False) -> dict[str, str]:
    """Our name -> the name in a Hugging Face Chameleon directory, where the decoder's weights are not; but in Anole's
    (`decoder`), under the names that they have in VQGAN."""
    return {
        ours: HUGGING_FACE_PREFIX + theirs
        for ours, theirs in meta_names(config).items()
        if decoder or not theirs.startswith("decoder.")
    }


def of_vqgan_yaml(settings: Mapping[str, Any], where: str) -> ImageTokenizerConfig:
    """The shape that Meta's `vqgan.yaml`, read into a dictionary, gives. Raises ConversionError."""
    try:
        params = settings["model"]["params"]
        shape = params["ddconfig"]
        require_same(
            where,
            {field: shape.get(field, value) for field, value in VQGAN_FIXED.items()},
            VQGAN_FIXED,
        )
        return ImageTokenizerConfig(
            resolution=shape["resolution"],
            codebook_size=params["n_embed"],
            embedding=params["embed_dim"],
            base_channels=shape["ch"],
            multipliers=list(shape["ch_mult"]),
            residual_blocks=shape["num_res_blocks"],
            latent_channels=shape["z_channels"],
            attention_resolutions=list(shape["attn_resolutions"]),
            middle_attention=shape.get("attn_type", "vanilla") == "vanilla",
            norm_groups=NORM_GROUPS,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{where} is not a VQGAN configuration: {error!r}") from error
    except ValidationError as error:
        raise ConversionError(f"{where}: a VQGAN that cannot be: {error}") from error


def of_hugging_face(settings: Mapping[str, Any], where: str) -> ImageTokenizerConfig:
    """The shape that `vq_config` of a Hugging Face config.json gives, without decoder. Raises ConversionError."""
    given = {**HUGGING_FACE_DEFAULTS, **settings}
    require_same(where, given, HUGGING_FACE_FIXED)
    attends = given["attn_type"] == "vanilla"
    try:
        return ImageTokenizerConfig(
            resolution=given["resolution"],
            codebook_size=given["num_embeddings"],
            embedding=given["embed_dim"],
            base_channels=given["base_channels"],
            multipliers=list(given["channel_multiplier"]),
            residual_blocks=given["num_res_blocks"],
            latent_channels=given["latent_channels"],
            attention_resolutions=list(given["attn_resolutions"] or []) if attends else [],
            middle_attention=attends,
            norm_groups=NORM_GROUPS,
            decoder=False,
        )
    except ValidationError as error:
        raise ConversionError(f"{where}: a VQGAN that cannot be: {error}") from error


def to_hugging_face(config: ImageTokenizerConfig, where: str) -> dict[str, Any]:
    """`vq_config` for a Hugging Face config.json. Raises ConversionError for a shape that transformers lacks."""
    widths = [config.base_channels * multiplier for multiplier in (1, *config.multipliers)]
    if groups := sorted({config.groups(width) for width in widths} - {NORM_GROUPS}):
        raise ConversionError(
            f"{where}: transformers normalizes the image tokenizer in {NORM_GROUPS} groups, and this one has {groups}; "
            f"train the image tokenizer with norm_groups {NORM_GROUPS} to export it"
        )
    if config.attention_resolutions and not config.middle_attention:
        raise ConversionError(f"{where}: transformers has no image tokenizer with attention but for the middle")
    return {
        **HUGGING_FACE_FIXED,
        "model_type": "chameleon_vqgan",
        "resolution": config.resolution,
        "num_embeddings": config.codebook_size,
        "embed_dim": config.embedding,
        "latent_channels": config.latents,
        "base_channels": config.base_channels,
        "channel_multiplier": config.multipliers,
        "num_res_blocks": config.residual_blocks,
        "attn_resolutions": config.attention_resolutions or None,
        "attn_type": "vanilla" if config.middle_attention else "none",
        "dropout": 0.0,
    }


def renamed(weights: Weights, table: dict[str, str], config: ImageTokenizerConfig, where: str) -> dict[str, LazyTensor]:
    """Our names for the weights of another layout; `table`: ours -> theirs. Raises ConversionError."""
    require_names(where, weights, table.values())
    entries = {ours: weights[theirs] for ours, theirs in table.items()}
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in ImageTokenizer(config).state_dict().items()}
    require_shapes(where, entries, {name: expected[name] for name in table})
    return entries


def open_vqgan(checkpoint: Path, settings: Mapping[str, Any]) -> tuple[ImageTokenizerConfig, dict[str, LazyTensor]]:
    """Encoder, codebook and decoder of Meta's `vqgan.ckpt`. Raises ConversionError."""
    config = of_vqgan_yaml(settings, f"the VQGAN configuration beside {checkpoint}")
    loaded = open_checkpoint(checkpoint)
    state = loaded.get("state_dict", loaded)
    weights = {
        name: LazyTensor.of(tensor)
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not name.startswith(META_IGNORED_PREFIXES)
    }
    return config, renamed(weights, meta_names(config), config, str(checkpoint))


def require_codes(where: str, vocabulary: Vocabulary, config: ImageTokenizerConfig) -> None:
    """Raises ConversionError when image ids and codebook entries are not as many."""
    if len(vocabulary.image_codes) != config.codebook_size:
        raise ConversionError(
            f"{where}: the tokenizer has {len(vocabulary.image_codes)} image codes, the codebook {config.codebook_size}"
        )


def write_image_tokenizer(config: ImageTokenizerConfig, weights: Weights, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory)
    write_weights(directory, weights, shard_bytes=sys.maxsize)
