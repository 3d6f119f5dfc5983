"""The model directory: what is trained, served, registered and exchanged.

config.json, model.safetensors                        Transformer; or shards with model.safetensors.index.json
text_tokenizer.model, vocabulary.json                 text tokenizer and the id space; or text_tokenizer.json
image_tokenizer/config.json, image_tokenizer/model.safetensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from calumma.model import config, vocabulary, weights
from calumma.model.config import ModelConfig
from calumma.model.document import Document
from calumma.model.encoding import DocumentEncoder
from calumma.model.loading import read_transformer
from calumma.model.tokenizers import text
from calumma.model.tokenizers.image import WEIGHTS, ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, write_weights

IMAGE_TOKENIZER = "image_tokenizer"
FILES = (
    config.FILE,
    weights.FILE,
    text.FILE,
    vocabulary.FILE,
    f"{IMAGE_TOKENIZER}/{config.FILE}",
    f"{IMAGE_TOKENIZER}/{WEIGHTS}",
)
# What may stand in a file's place: shards and their index, a tokenizer of an imported model.
INSTEAD = {weights.FILE: weights.INDEX, text.FILE: text.HUGGING_FACE_FILE}


def missing_files(exists: Callable[[str], bool]) -> list[str]:
    """What a model directory lacks; exists(name) tells whether it has a file."""
    return [name for name in FILES if not exists(name) and not (name in INSTEAD and exists(INSTEAD[name]))]


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
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    read: Callable[..., Transformer] | None = None,
) -> MixedModalModel:
    """Read a model directory for inference. `dtype` None keeps the stored one. `read` reads the Transformer in place of
    `read_transformer`, say a shard of it (generation.read_shard).

    Raises FileNotFoundError that lists what is missing, ValueError when the parts do not belong together.
    """
    directory = Path(directory)
    if missing := missing_files(lambda name: (directory / name).is_file()):
        raise FileNotFoundError(f"{directory} is not a whole model directory: {', '.join(missing)} missing")
    ids = Vocabulary.read(directory)
    encoder = DocumentEncoder(
        ids, TextTokenizer.read(directory), ImageTokenizer.read(directory / IMAGE_TOKENIZER, device)
    )
    transformer = (read or read_transformer)(directory, device, dtype)
    if transformer.config.vocabulary_size != ids.size:
        raise ValueError(
            f"{directory}: the Transformer has {transformer.config.vocabulary_size} ids, the vocabulary {ids.size}"
        )
    return MixedModalModel(transformer.eval(), encoder)


def save_model(
    directory: str | Path, transformer: Transformer, text_tokenizer_dir: str | Path, image_tokenizer_dir: str | Path
) -> None:
    """Write a whole model directory from a Transformer and the directories of its two tokenizers."""
    directory = Path(directory)
    (directory / IMAGE_TOKENIZER).mkdir(parents=True, exist_ok=True)
    transformer.config.save(directory)
    write_weights(directory, {name: LazyTensor.of(tensor) for name, tensor in transformer.state_dict().items()})
    tokenizer = text.file_of(text_tokenizer_dir)
    for name in (tokenizer.name, vocabulary.FILE):
        (directory / name).write_bytes((Path(text_tokenizer_dir) / name).read_bytes())
    for name in (config.FILE, WEIGHTS):
        (directory / IMAGE_TOKENIZER / name).write_bytes((Path(image_tokenizer_dir) / name).read_bytes())
