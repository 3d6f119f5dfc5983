"""The model directory: what is trained, served, registered and exchanged.

config.json, model.safetensors                        Transformer
text_tokenizer.model, vocabulary.json                 text tokenizer and the id space
image_tokenizer/config.json, image_tokenizer/model.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from calumma.model import config, text_tokenizer, vocabulary
from calumma.model.config import ModelConfig
from calumma.model.document import Document
from calumma.model.encoding import DocumentEncoder
from calumma.model.image_tokenizer import WEIGHTS, ImageTokenizer
from calumma.model.text_tokenizer import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

IMAGE_TOKENIZER = "image_tokenizer"
FILES = (
    config.FILE,
    WEIGHTS,
    text_tokenizer.FILE,
    vocabulary.FILE,
    f"{IMAGE_TOKENIZER}/{config.FILE}",
    f"{IMAGE_TOKENIZER}/{WEIGHTS}",
)


@dataclass
class MixedModalModel:
    """A model directory in memory: Transformer, tokenizers, vocabulary."""

    transformer: Transformer
    encoder: DocumentEncoder

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def vocabulary(self) -> Vocabulary:
        return self.encoder.vocabulary

    @property
    def text_tokenizer(self) -> TextTokenizer:
        return self.encoder.text_tokenizer

    @property
    def image_tokenizer(self) -> ImageTokenizer:
        return self.encoder.image_tokenizer

    @property
    def image_length(self) -> int:
        return self.encoder.image_length

    @property
    def device(self) -> torch.device:
        return self.transformer.embedding.weight.device

    def encode(self, document: Document, complete: bool = True) -> list[int]:
        """Token ids; `complete=False` leaves the end open for the model to go on (see `encoding.py`)."""
        return self.encoder.encode(document, complete).ids

    def decode(self, tokens: Sequence[int]) -> Document:
        """Token ids, encoded or sampled, back to text and images."""
        return self.encoder.decode(tokens)


def load(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MixedModalModel:
    """Read a model directory for inference. `dtype` None keeps the stored one.

    Raises FileNotFoundError that lists what is missing, ValueError when the parts do not belong together.
    """
    directory = Path(directory)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory} is not a whole model directory: {', '.join(missing)} missing")
    ids = Vocabulary.read(directory)
    encoder = DocumentEncoder(
        ids, TextTokenizer.read(directory), ImageTokenizer.read(directory / IMAGE_TOKENIZER, device)
    )
    transformer = read_transformer(directory, device, dtype)
    if transformer.config.vocabulary_size != ids.size:
        raise ValueError(
            f"{directory}: the Transformer has {transformer.config.vocabulary_size} ids, the vocabulary {ids.size}"
        )
    return MixedModalModel(transformer.eval(), encoder)


def read_transformer(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """The Transformer of a model directory, with its weights."""
    with torch.device("meta"):
        transformer = Transformer(ModelConfig.read(directory))
    weights = load_file(str(Path(directory) / WEIGHTS), device=str(device))
    transformer.load_state_dict(weights, assign=True)
    transformer.rebuild_rope(device)
    return transformer if dtype is None else transformer.to(dtype)


def save_model(
    directory: str | Path, transformer: Transformer, text_tokenizer_dir: str | Path, image_tokenizer_dir: str | Path
) -> None:
    """Write a whole model directory from a Transformer and the directories of its two tokenizers."""
    directory = Path(directory)
    (directory / IMAGE_TOKENIZER).mkdir(parents=True, exist_ok=True)
    transformer.config.save(directory)
    save_file({k: v.contiguous().cpu() for k, v in transformer.state_dict().items()}, str(directory / WEIGHTS))
    for name in (text_tokenizer.FILE, vocabulary.FILE):
        (directory / name).write_bytes((Path(text_tokenizer_dir) / name).read_bytes())
    for name in (config.FILE, WEIGHTS):
        (directory / IMAGE_TOKENIZER / name).write_bytes((Path(image_tokenizer_dir) / name).read_bytes())
