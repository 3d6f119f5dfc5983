"""What the training of a text tokenizer and a tokenization may be asked."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.specification import JobSpecification, basename, repeated

PREFERENCES = "preferences"  # Manifest.kind of token shards of pairs


class TextTokenizerSpecification(JobSpecification):
    """Trains the BPE model over curated documents; writes text_tokenizer.model, vocabulary.json and a manifest."""

    job: Literal["train_text_tokenizer"] = "train_text_tokenizer"
    documents: list[str] = Field(min_length=1, description="curated directories whose text it learns from")
    output: str = Field("tokenizers/text", description="folder of the tokenizer")
    vocabulary_size: int = Field(65536, ge=300, description="all ids: special, image codes, bytes, merges")
    image_codes: int = Field(
        8192, ge=2, description="ids kept for images: as many as the image tokenizer's codebook has"
    )
    max_characters: int = Field(
        100_000_000, ge=1000, description="of text to learn from, taken from all directories in turn"
    )


class TokenizeSpecification(JobSpecification):
    """Curated documents -> packed token shards. Each entry of `documents` becomes `output/<its last path part>`."""

    job: Literal["tokenize"] = "tokenize"
    documents: list[str] = Field(min_length=1, description="curated directories")
    text_tokenizer: str = Field("tokenizers/text", description="folder of a trained one, or a model directory")
    image_tokenizer: str = Field(
        "tokenizers/image", description="folder of a trained one, or `image_tokenizer` of a model directory"
    )
    output: str = Field("tokens", description="folder of the token shards, one below it a directory of documents")
    context: int = Field(4096, ge=16, description="tokens of a packed sequence; it must hold an image")
    packing: Literal["on", "off"] = Field(
        "on", description="on: documents share a packed sequence where they fit; off: each has its own, padded"
    )
    micro_batch: int = Field(1, ge=1, description="packed sequences a row group, the unit a worker reads")
    micro_batches_per_shard: int = Field(256, ge=1, description="row groups of one Parquet file")
    window: int = Field(
        1000,
        ge=1,
        description="documents, about, that a task shuffles and packs together: more make fuller rows and shards, and "
        "a killed job has more to repeat",
    )
    image_batch: int = Field(
        16, ge=1, description="images coded at once; 16 of 512x512 need about 8 GB of the device's memory"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := repeated(basename(location) for location in self.documents):
            raise ValueError(f"documents: several end in {', '.join(twice)}; their tokens would share a directory")
        return self


class PreferenceTokensSpecification(JobSpecification):
    """Pairs of a wanted and an unwanted answer -> token shards that the two stand in side by side, for `preference` of
    the job finetune. In one process."""

    job: Literal["tokenize_preferences"] = "tokenize_preferences"
    location: str = Field(description="files of pairs as TRL or LLaMA-Factory have them: JSON lines, JSON, Parquet, …")
    images: str | None = Field(None, description="the folder of the images that records name; default: each file's own")
    mark: Literal["<image>", "<|image|>"] = Field("<image>", description="what stands for an image in a text")
    text_tokenizer: str = Field("tokenizers/text", description="folder of a trained one, or a model directory")
    image_tokenizer: str = Field(
        "tokenizers/image", description="folder of a trained one, or `image_tokenizer` of a model directory"
    )
    output: str = Field("preferences", description="folder of the token shards: train, and held_out below it")
    held_out: float = Field(0.0, ge=0, le=0.5, description="share of the prompts whose pairs go to held_out")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="the job fails when more of the pairs are wrong")
    context: int = Field(4096, ge=16, description="tokens of a row; it must hold a prompt with one of its answers")
    micro_batch: int = Field(2, ge=2, multiple_of=2, description="rows a row group: chosen and rejected in turn")
    window: int = Field(1000, ge=1, description="pairs that are shuffled and packed together")
