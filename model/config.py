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


class ModelConfig(_Shape):
    """Transformer architecture. `vocabulary_size` 0 means: as many ids as the vocabulary it is trained with."""

    vocabulary_size: int = Field(0, ge=0)
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn_width: int = Field(ge=1)
    context: int = Field(4096, ge=2)
    query_key_norm: bool = True
    norm_order: Literal["pre", "swin"] = "pre"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    dropout: float = Field(0.0, ge=0, lt=1)
    mask_documents: bool = Field(
        False, description="attend within a document only (block-diagonal); the paper does not"
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} over {self.heads} heads must give an even head size")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        return self

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class ImageTokenizerConfig(_Shape):
    """VQ autoencoder. An image of `resolution` becomes `codes_per_image` codes out of `codebook_size`."""

    resolution: int = Field(512, ge=4)
    codebook_size: int = Field(8192, ge=2)
    embedding: int = Field(256, ge=1)
    base_channels: int = Field(128, ge=1)
    multipliers: list[int] = Field([1, 1, 2, 2, 4], min_length=1)
    residual_blocks: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _downsamples(self) -> Self:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} must be a multiple of {self.downsampling} "
                f"(each multiplier after the first halves the picture)"
            )
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


PRESETS: dict[str, dict[str, Any]] = {
    "chameleon-7b": dict(
        vocabulary_size=65536, layers=32, width=4096, heads=32, kv_heads=32, ffn_width=11008, dropout=0.1
    ),
    "chameleon-34b": dict(
        vocabulary_size=65536, layers=48, width=8192, heads=64, kv_heads=8, ffn_width=22016, norm_order="swin"
    ),
}


def preset(name: str) -> ModelConfig:
    """A published shape by name. Raises KeyError that lists the names."""
    if name not in PRESETS:
        raise KeyError(f"no model preset {name!r}; there are: {', '.join(sorted(PRESETS))}")
    return ModelConfig(**PRESETS[name])
