"""What the training of a text tokenizer and a tokenization may be asked."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from calumma.platform.specification import JobSpecification, basename, repeated


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
