"""A tiny model directory with real tokenizers, and the tutorial's files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calumma.model import MixedModalModel, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import save_model
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer

PAGE = Path(__file__).resolve().parents[3] / "docs/pages/first-change.md"


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    texts = ["Which digit is this? seven", "Draw a three.", "answer Question 1 2 3?"] * 20
    vocabulary = train_text_tokenizer(texts, root, vocabulary_size=320, image_codes=16)
    shape = ImageTokenizerConfig(
        resolution=8,
        codebook_size=16,
        embedding=8,
        base_channels=32,
        multipliers=[1, 1],
        residual_blocks=1,
        norm_groups=32,
    )
    ImageTokenizer(shape).save(root / "image")
    config = ModelConfig(
        vocabulary_size=vocabulary.size, layers=2, width=32, heads=2, kv_heads=2, ffn_width=64, context=128
    )
    save_model(root / "model", Transformer(config).initialize(0), root, root / "image")
    return root / "model"


@pytest.fixture(scope="session")
def model(model_directory: Path) -> MixedModalModel:
    return load(model_directory)


@pytest.fixture(scope="session")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tutorial of the first change after `python adding.py 40`."""
    place = tmp_path_factory.mktemp("first-change")
    for title, text in re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE.read_text(), re.DOTALL):
        (place / title).write_text(text)
    subprocess.run([sys.executable, "adding.py", "40"], cwd=place, check=True)
    return place
