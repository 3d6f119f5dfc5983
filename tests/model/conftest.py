"""A tiny model of every part, made once: real tokenizers trained on small texts, random weights elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calumma.model import MixedModalModel, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer

CODES = 32


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    parts = tmp_path_factory.mktemp("parts")
    texts = [
        "Which digit is this? Draw a seven. Count from two to four, with pictures.\n" * 5,
        "def f(x):\n    return x\n",
    ]
    vocabulary = train_text_tokenizer(texts, parts, vocabulary_size=400, image_codes=CODES)
    shape = ImageTokenizerConfig(
        resolution=16, codebook_size=CODES, embedding=8, base_channels=8, multipliers=[1, 2, 2], residual_blocks=1
    )
    ImageTokenizer(shape).save(parts / IMAGE_TOKENIZER)
    config = ModelConfig(
        vocabulary_size=vocabulary.size, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=128
    )
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, Transformer(config).initialize(0), parts, parts / IMAGE_TOKENIZER)
    return directory


@pytest.fixture(scope="session")
def model(model_directory: Path) -> MixedModalModel:
    return load(model_directory)
