"""A tiny model of every part, made once: real tokenizers trained on small texts, random weights elsewhere; and the
public release's kinds of tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from calumma.model import MixedModalModel, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer

CODES = 32
TEXTS = ["Which digit is this? Draw a seven. Count from two to four, with pictures.\n", "def f(x):\n    return x\n"]
CODE_ORDER = (3, 1, 0, 2, *range(4, 16))  # codes stand in any order among the ids


def image_names() -> list[str]:
    """Names of 16 image codes: decimal digits as letters A..J."""
    return ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z" for code in CODE_ORDER]


def special_names() -> list[str]:
    reserved = [f"<reserved{number:05d}>" for number in range(8704, 8709)]
    return ["<s>", "<pad>", "</s>", "<unk>", *image_names(), "<eoss>", "<racm3:break>", *reserved]


@pytest.fixture(scope="session")
def byte_level() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json with the public release's special names, 300 ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_names(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())
    return trained


@pytest.fixture(scope="session")
def byte_fallback() -> dict[str, Any]:
    """A tokenizer.json as Llama's: a space before every text, spaces as U+2581, unknown characters as bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_names = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=[*special_names(), *byte_names], max_token_length=12, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())
    trained["added_tokens"] = [token for token in trained["added_tokens"] if token["content"] not in byte_names]
    return trained


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
