"""The model directory: whole or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from calumma.model import MixedModalModel, load
from calumma.model.directory import FILES


def test_loading_gives_the_saved_weights(model_directory: Path, model: MixedModalModel) -> None:
    tokens = torch.arange(12)[None]
    assert torch.equal(load(model_directory).transformer(tokens), model.transformer(tokens))
    assert load(model_directory, dtype=torch.bfloat16).transformer.output.weight.dtype == torch.bfloat16


def test_weights_in_bfloat16_keep_exact_rotary_positions(model_directory: Path, model: MixedModalModel) -> None:
    half = load(model_directory, dtype=torch.bfloat16)
    assert half.transformer.rope.dtype == torch.float32
    tokens = torch.arange(40)[None]
    assert torch.allclose(half.transformer(tokens), model.transformer(tokens), atol=0.05)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(model_directory: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_directory, copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load(copy)


def test_a_vocabulary_of_another_size_is_refused(model_directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_directory, copy)
    text = (copy / "vocabulary.json").read_text()
    (copy / "vocabulary.json").write_text(text.replace('"size":400', '"size":401'))
    with pytest.raises(ValueError, match="400 ids, the vocabulary 401"):
        load(copy)
