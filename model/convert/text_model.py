"""Text models of Hugging Face made mixed-modal: Llama 2 and 3, Mistral, Qwen 2, 2.5 and 3.

Their weights and ids stay as they are, so that their answers to text do; ids for images, and rows for these in the
embedding and the output projection, follow. transformers' models of the same names say what a config.json means.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from calumma.model.config import FILE, ImageTokenizerConfig, ModelConfig, RopeScaling
from calumma.model.convert import text
from calumma.model.convert.folders import require_head, require_weights
from calumma.model.convert.hugging_face import open_source, to_ours
from calumma.model.convert.names import IGNORED, ConversionError, Progress, require_same, shapes
from calumma.model.convert.publish import atomic_folder
from calumma.model.convert.text_vocabulary import extended_vocabulary
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.tokenizers.image import WEIGHTS
from calumma.model.weights import SHARD_BYTES, LazyTensor, write_weights

# What a config.json says where it says nothing, by transformers' configuration classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
    },
}
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Extension:
    """What was made of a text model: `further` ids after its own; `told`: what is not as it was there."""

    config: ModelConfig
    further: int
    told: list[str] = field(default_factory=list)


def extend_hugging_face(
    source: str | Path,
    destination: str | Path,
    image_tokenizer: str | Path,
    *,
    context: int | None = None,
    untie: bool = False,
    query_key_norm: Literal["layer", "rms"] | None = None,
    chat_template: bool = True,
    spread: float = 1e-5,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Extension:
    """Write a mixed-modal model directory from a text model's folder and the directory of an image tokenizer.

    Weights keep their dtype, and text its logits; but with `query_key_norm`, which adds normalization where there was
    none (the paper's way to keep training stable). context: a shorter one. untie: an output projection of its own where
    the model shares the embedding. spread: see `further_rows`. Raises ConversionError.
    """
    source, image_tokenizer = Path(source), Path(image_tokenizer)
    require_weights(source)
    settings = text.read_json(source / "config.json")
    told: list[str] = []
    config = config_of(settings, str(source / "config.json"), told)
    if context is not None:
        if not 2 <= context <= config.context:
            raise ConversionError(f"context {context} must lie in 2..{config.context}, what the text model allows")
        config = config.model_copy(update={"context": context})
    images = _image_tokenizer(image_tokenizer)
    codes = ImageTokenizerConfig.read(images).codebook_size
    weights = to_ours(_of_text(open_source(source), config, source), config, str(source))
    own = config.vocabulary_size
    vocabulary, tokenizer, _ = extended_vocabulary(source, settings, own, codes, chat_template)
    generator = torch.Generator().manual_seed(seed)
    further = vocabulary.size - own
    text_ids = [token for token in vocabulary.text_ids if token < own]
    for name in ("embedding.weight", *(() if config.tied else ("output.weight",))):
        weights[name] = _with_rows(weights[name], further_rows(weights[name], text_ids, further, spread, generator))
    if untie and config.tied:
        weights = {**weights, "output.weight": weights["embedding.weight"]}
    config = config.model_copy(update={"vocabulary_size": vocabulary.size, "tied": config.tied and not untie})
    if query_key_norm is not None:
        config = _normalized(config, query_key_norm, weights)
        told.append("query-key normalization was added: text logits are not the text model's until it is trained")
    with atomic_folder(destination) as folder:
        tokenizer.save(folder)
        vocabulary.save(folder)
        config.save(folder)
        (folder / IMAGE_TOKENIZER).mkdir()
        for file in (FILE, WEIGHTS):
            shutil.copyfile(images / file, folder / IMAGE_TOKENIZER / file)
        write_weights(folder, weights, shard_bytes, progress)
    return Extension(config, further, told)


def config_of(settings: Mapping[str, Any], where: str, told: list[str]) -> ModelConfig:
    """Our configuration for a text model's config.json; what cannot be kept is added to `told`. Raises
    ConversionError."""
    family = settings.get("model_type")
    if family not in DEFAULTS:
        hint = "; `calumma import hf` reads it" if family == "chameleon" else ""
        raise ConversionError(f"{where}: model_type {family!r} cannot be extended; {', '.join(DEFAULTS)} can{hint}")
    if "quantization_config" in settings:
        raise ConversionError(f"{where}: the weights are quantized; extend the model in bfloat16 or float16")
    given = {**COMMON, **DEFAULTS[family], **{key: value for key, value in settings.items() if value is not None}}
    if settings.get("sliding_window", ...) is None:
        given["sliding_window"] = None
    require_same(where, {"partial_rotary_factor": 1.0, **given}, {"hidden_act": "silu", "partial_rotary_factor": 1.0})
    qkv_bias = family == "qwen2" or bool(given.get("attention_bias"))
    try:
        head_size = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
        own_size = head_size if head_size * given["num_attention_heads"] != given["hidden_size"] else None
        return ModelConfig(
            vocabulary_size=given["vocab_size"],
            layers=given["num_hidden_layers"],
            width=given["hidden_size"],
            heads=given["num_attention_heads"],
            kv_heads=given.get("num_key_value_heads") or given["num_attention_heads"],
            ffn_width=given["intermediate_size"],
            own_head_size=own_size,
            context=_context(given, family, told),
            query_key_norm="rms" if family == "qwen3" else False,
            norm_eps=given["rms_norm_eps"],
            rope_theta=_rope(given).get("rope_theta") or given.get("rope_theta") or 10_000.0,
            rope_scaling=_rope_scaling(given, where),
            query_key_value_bias=qkv_bias,
            attention_output_bias=family != "qwen2" and qkv_bias,
            feed_forward_bias=bool(given.get("mlp_bias")),
            tied=given["tie_word_embeddings"],
        )
    except KeyError as error:
        raise ConversionError(f"{where} says no {error.args[0]}") from error
    except ValidationError as error:
        raise ConversionError(f"{where}: a model that cannot be: {error}") from error


def _context(given: Mapping[str, Any], family: str, told: list[str]) -> int:
    """Positions; of a model that attends to a window of them, no more than the window: there it is the same model."""
    context, window = int(given["max_position_embeddings"]), given.get("sliding_window")
    slides = family == "mistral" or given.get("use_sliding_window")
    if not slides or window is None or window >= context:
        return context
    told.append(
        f"the text model attends to a sliding window of {window} of its {context} positions, which calumma has not: "
        f"the context is {window}, within which both are the same"
    )
    return int(window)


def _rope(given: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    return rope if isinstance(rope, Mapping) else {}


def _rope_scaling(given: Mapping[str, Any], where: str) -> RopeScaling | None:
    rope = _rope(given)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS or rope.get("mscale") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        extra = [f"{name} {rope[name]!r}" for name in ("mscale", "partial_rotary_factor") if name in rope]
        raise ConversionError(
            f"{where}: the rotary embedding {' '.join([repr(kind), *extra])} is not one that calumma has: "
            f"{', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return None
    original = rope.get("original_max_position_embeddings") or given["max_position_embeddings"]
    fields = {
        "low_frequency": "low_freq_factor",
        "high_frequency": "high_freq_factor",
        "beta_slow": "beta_slow",
        "beta_fast": "beta_fast",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
    }
    known = {ours: rope[theirs] for ours, theirs in fields.items() if rope.get(theirs) is not None}
    factor = rope.get("factor") or given["max_position_embeddings"] / original
    return RopeScaling(kind=kind, factor=factor, original_context=None if kind == "linear" else original, **known)


def _of_text(found: dict[str, LazyTensor], config: ModelConfig, source: Path) -> dict[str, LazyTensor]:
    """The weights under the names of a model with a head. Raises ConversionError where there is no head."""
    if not any(name.startswith("model.") for name in found) and "embed_tokens.weight" in found:
        found = {name if name == "lm_head.weight" else f"model.{name}": entry for name, entry in found.items()}
    if config.tied:
        return {name: entry for name, entry in found.items() if name != "lm_head.weight"}
    require_head(source, found)
    return {name: entry for name, entry in found.items() if not IGNORED.fullmatch(name)}


def _image_tokenizer(directory: Path) -> Path:
    """The folder of an image tokenizer: itself, or a model directory's. Raises ConversionError."""
    for folder in (directory / IMAGE_TOKENIZER, directory):
        if (folder / FILE).is_file() and (folder / WEIGHTS).is_file():
            try:
                ImageTokenizerConfig.read(folder)
            except ValidationError as error:
                raise ConversionError(f"{folder / FILE} describes no image tokenizer: {error}") from error
            return folder
    raise ConversionError(
        f"{directory} is no image tokenizer: it has no {FILE} and {WEIGHTS}. Give what train_image_tokenizer made, or "
        "a model directory, whose image tokenizer is taken"
    )


def further_rows(
    entry: LazyTensor, text_ids: list[int], count: int, spread: float, generator: torch.Generator
) -> Tensor:
    """FloatTensor [count, D]: rows for ids that follow, drawn from a normal distribution with the mean of the rows of
    the text's ids and `spread` times their covariance (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models", https://nlp.stanford.edu/~johnhew/vocab-expansion.html, which takes 1e-5).

    So the logits of new ids are about the mean of the others', and take little probability from text; of small random
    rows logits are about 0, which may be far above all others.
    """
    width = entry.shape[1]
    kept_V = torch.zeros(entry.shape[0], dtype=torch.bool)
    kept_V[torch.tensor(text_ids, dtype=torch.long)] = True
    total_D = torch.zeros(width, dtype=torch.float64)
    square_DD = torch.zeros(width, width)
    for rows, chunk in entry.chunks((), torch.float32.itemsize):
        total_D += chunk[kept_V[rows]].double().sum(0)
    mean_D = (total_D / len(text_ids)).float()
    for rows, chunk in entry.chunks((), torch.float32.itemsize):
        off_RD = chunk[kept_V[rows]].float() - mean_D
        square_DD += off_RD.T @ off_RD
    covariance_DD = square_DD / len(text_ids)
    covariance_DD.diagonal().add_(1e-6 * covariance_DD.diagonal().mean() + 1e-30)  # fewer rows than D: no full rank
    factor_DD = torch.linalg.cholesky(covariance_DD)
    return mean_D + spread**0.5 * torch.randn(count, width, generator=generator) @ factor_DD.T


def _with_rows(entry: LazyTensor, rows_KD: Tensor) -> LazyTensor:
    shape = (entry.shape[0] + len(rows_KD), *entry.shape[1:])
    return LazyTensor(shape, entry.dtype, lambda: torch.cat([entry.read(), rows_KD.to(entry.dtype)]))


def _normalized(config: ModelConfig, kind: str, weights: dict[str, LazyTensor]) -> ModelConfig:
    """With a query-key normalization that begins with weights of 1 and biases of 0. Raises ConversionError."""
    if config.query_key_norm:
        raise ConversionError("the text model normalizes queries and keys already; leave --query-key-norm away")
    config = config.model_copy(update={"query_key_norm": True if kind == "layer" else "rms"})
    dtype = weights["embedding.weight"].dtype
    for name, shape in shapes(config).items():
        if name not in weights:
            made = torch.ones if name.endswith(".weight") else torch.zeros
            weights[name] = LazyTensor.of(made(shape, dtype=dtype))
    return config
