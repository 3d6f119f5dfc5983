"""Shapes of the Transformer and of the image tokenizer, the published ones as presets (paper sections 2.1, 2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FILE = "config.json"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def save(self, directory: str | Path) -> None:
        (Path(directory) / FILE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        return cls.model_validate_json((Path(directory) / FILE).read_text())


class RopeScaling(_Shape):
    """Rotary frequencies stretched to a longer context than they were trained with, by `factor`.

    `linear`: all of them (position interpolation, arXiv 2306.15595). `llama3`: those of long waves, by the band between
    `low_frequency` and `high_frequency` turns of the original context (meta-llama/llama-models, `apply_scaling`).
    `yarn`: by a ramp between `beta_slow` and `beta_fast` turns of it, the attention logits warmed (arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"] = Field(description="which frequencies are stretched, and how")
    factor: float = Field(ge=1, description="by which the context grew")
    original_context: int | None = Field(None, ge=2, description="before it; `llama3` and `yarn` need it")
    low_frequency: float = Field(1.0, gt=0, description="`llama3`: turns below which a wave is stretched whole")
    high_frequency: float = Field(4.0, gt=0, description="`llama3`: turns above which it is left alone")
    beta_slow: float = Field(1.0, gt=0, description="`yarn`: turns below which a wave is stretched whole")
    beta_fast: float = Field(32.0, gt=0, description="`yarn`: turns above which it is left alone")
    truncate: bool = Field(True, description="`yarn`: the ramp begins and ends at whole pairs of a head")
    attention_factor: float | None = Field(
        None, gt=0, description="`yarn`: of queries and keys; none: 0.1 ln(factor) + 1"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind != "linear" and self.original_context is None:
            raise ValueError(f"rope scaling {self.kind} needs original_context, the context before it")
        if self.high_frequency <= self.low_frequency or self.beta_fast <= self.beta_slow:
            raise ValueError("rope scaling: high_frequency must exceed low_frequency, and beta_fast beta_slow")
        return self


class ModelConfig(_Shape):
    """Transformer architecture. `vocabulary_size` 0 means: as many ids as the vocabulary it is trained with.

    A `preset` among the given values names a shape of PRESETS; the values beside it change that shape. The defaults are
    the paper's; what text models have otherwise (Llama, Mistral, Qwen) are settings.
    """

    vocabulary_size: int = Field(0, ge=0, description="ids in all; 0: as many as the vocabulary it is trained with")
    layers: int = Field(ge=1, description="blocks")
    width: int = Field(ge=1, description="of the residual stream")
    heads: int = Field(
        ge=1, description="of queries; `width` over them is an even head size, if it has none of its own"
    )
    kv_heads: int = Field(ge=1, description="of keys and values; fewer than `heads` is grouped-query attention")
    ffn_width: int = Field(ge=1, description="of the hidden layer of each SwiGLU")
    own_head_size: int | None = Field(
        None,
        ge=2,
        multiple_of=2,
        description="of each head; none: `width` / `heads` (another one: Qwen 3, Mistral Nemo)",
    )
    context: int = Field(4096, ge=2, description="longest sequence, in tokens")
    query_key_norm: bool | Literal["rms"] = Field(
        True,
        description="normalize queries and keys; true: LayerNorm with weights for every head, the paper's; "
        "`rms`: RMSNorm with one weight for all (Qwen 3, arXiv 2505.09388)",
    )
    norm_order: Literal["pre", "swin"] = Field(
        "pre", description="`pre`: before attention and feed-forward; `swin`: after them, as in the paper's 34B"
    )
    norm_eps: float = Field(1e-5, description="added to the variance in every RMSNorm")
    rope_theta: float = Field(10_000.0, description="base of the rotary embedding")
    rope_scaling: RopeScaling | None = Field(None, description="of the rotary embedding, to a longer context")
    query_key_value_bias: bool = Field(False, description="a bias on these projections (Qwen 2, arXiv 2407.10671)")
    attention_output_bias: bool = Field(False, description="a bias on attention's output projection")
    feed_forward_bias: bool = Field(False, description="a bias on each matrix of the feed-forward")
    tied: bool = Field(
        False, description="the output projection is the embedding (arXiv 1608.05859), as in small text models"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="after attention and feed-forward, in training")
    mask_documents: bool = Field(
        False, description="attend within a document only (block-diagonal); the paper does not"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "preset" not in values:
            return values
        given = {key: value for key, value in values.items() if key != "preset"}
        return _shape(values["preset"]) | given

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.own_head_size is None and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ValueError(f"width {self.width} over {self.heads} heads must give an even head size")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        return self.own_head_size or self.width // self.heads


class ImageTokenizerConfig(_Shape):
    """VQ autoencoder. An image of `resolution` becomes `codes_per_image` codes out of `codebook_size`.

    The defaults are the public release's.
    """

    resolution: int = Field(512, ge=4, description="pixels a side")
    codebook_size: int = Field(8192, ge=2, description="codes there are")
    embedding: int = Field(256, ge=1, description="length of a code's vector")
    base_channels: int = Field(128, ge=1, description="channels of the first level")
    multipliers: list[int] = Field(
        [1, 1, 2, 2, 4],
        min_length=1,
        description="channels of each level, as multiples of `base_channels`; each after the first halves the picture",
    )
    residual_blocks: int = Field(2, ge=1, description="a level of the encoder")
    decoder_residual_blocks: int | None = Field(
        None, ge=1, description="a level of the decoder; none: one more than the encoder's, as in the release"
    )
    latent_channels: int | None = Field(None, ge=1, description="between encoder and quantizer; none: `embedding`")
    attention_resolutions: list[int] = Field([], description="feature map sizes at which every block attends")
    middle_attention: bool = Field(True, description="attention between the two blocks of the smallest feature map")
    norm_groups: int | None = Field(
        None, ge=1, description="of every GroupNorm; none: 32, fewer where a group would have under 4 channels"
    )
    decoder: bool = Field(True, description="false: weights imported without their decoder; it encodes only")

    @model_validator(mode="after")
    def _downsamples(self) -> Self:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of {self.downsampling} "
                f"(each multiplier after the first halves the picture)"
            )
        widths = [self.base_channels * multiplier for multiplier in (1, *self.multipliers)]
        if self.norm_groups and any(width % self.norm_groups for width in widths):
            raise ValueError(f"norm_groups {self.norm_groups} must divide the channels of every level, {widths[1:]}")
        return self

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        return self.resolution // self.downsampling

    @property
    def codes_per_image(self) -> int:
        return self.grid**2

    @property
    def latents(self) -> int:
        """Channels that the encoder gives and the decoder takes."""
        return self.latent_channels or self.embedding

    @property
    def decoder_blocks(self) -> int:
        return self.decoder_residual_blocks or self.residual_blocks + 1

    def groups(self, channels: int) -> int:
        """Groups of a GroupNorm over so many channels."""
        if self.norm_groups is not None:
            return self.norm_groups
        return next(groups for groups in range(max(1, min(32, channels // 4)), 0, -1) if channels % groups == 0)


class ImageLossConfig(_Shape):
    """What the image tokenizer is trained with (VQGAN, arXiv 2012.09841); the defaults are plain VQ-VAE."""

    pixels: Literal["l1", "l2"] = Field("l2", description="reconstruction error: mean absolute, or mean squared")
    codebook: Literal["gradient", "ema"] = Field("gradient", description="how codes move: by their loss, or averaging")
    ema_decay: float = Field(0.99, gt=0, lt=1, description="of the moving averages that `ema` keeps")
    perceptual_weights: str | None = Field(
        None, description="safetensors file of VGG16 and LPIPS weights; none: no perceptual loss"
    )
    perceptual: float = Field(1.0, ge=0, description="weight of the perceptual loss, where its weights are given")
    adversarial: float = Field(0.0, ge=0, description="weight of the patch discriminator's judgement; 0: none is made")
    adversarial_start: int = Field(0, ge=0, description="steps before the discriminator begins to learn and to count")
    adversarial_adaptive: bool = Field(True, description="scale its gradients to the reconstruction's (equation 7)")
    discriminator_channels: int = Field(64, ge=1, description="of its first layer")
    discriminator_layers: int = Field(3, ge=1, description="strided convolutions; each halves the picture")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="none: the tokenizer's")

    @property
    def smallest(self) -> int:
        """Pixels a side that an image needs at least: a patch for the discriminator, four poolings of VGG16."""
        patch = 3 * 2**self.discriminator_layers if self.adversarial else 1
        return max(patch, 16 if self.perceptual_weights else 1)


# The published shapes; and proxies of the 7B, named by all their parameters with the whole vocabulary of 65,536.
PRESETS: dict[str, dict[str, Any]] = {
    "chameleon-7b": dict(
        vocabulary_size=65536, layers=32, width=4096, heads=32, kv_heads=32, ffn_width=11008, dropout=0.1
    ),
    "chameleon-34b": dict(
        vocabulary_size=65536, layers=48, width=8192, heads=64, kv_heads=8, ffn_width=22016, norm_order="swin"
    ),
    "calumma-20m": dict(vocabulary_size=65536, layers=12, width=128, heads=2, kv_heads=2, ffn_width=384),
    "calumma-125m": dict(vocabulary_size=65536, layers=18, width=512, heads=8, kv_heads=8, ffn_width=1408),
    "calumma-350m": dict(vocabulary_size=65536, layers=16, width=1024, heads=16, kv_heads=16, ffn_width=2816),
    "calumma-1.3b": dict(vocabulary_size=65536, layers=20, width=2048, heads=16, kv_heads=16, ffn_width=5504),
}


def preset(name: str) -> ModelConfig:
    """A shape of PRESETS by name. Raises KeyError that lists the names."""
    try:
        return ModelConfig(**_shape(name))
    except ValueError as error:
        raise KeyError(str(error)) from error


def _shape(name: Any) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"no model preset {name!r}; there are: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
