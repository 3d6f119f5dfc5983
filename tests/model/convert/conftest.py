"""Models of transformers, saved as Hugging Face directories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from calumma.model.convert import import_hugging_face

VQ: dict[str, Any] = dict(
    resolution=16,
    base_channels=32,
    channel_multiplier=[1, 2],
    num_res_blocks=1,
    embed_dim=8,
    latent_channels=8,
    num_embeddings=16,
)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4),
    "grouped": dict(hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2),
    "swin": dict(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=8,
        num_key_value_heads=1,
        swin_norm=True,
        vocab_size=301,
    ),
    "odd": dict(
        hidden_size=30,
        intermediate_size=37,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=3,
        vocab_size=331,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        vq_config=VQ | dict(latent_channels=12, channel_multiplier=[1, 1, 3], num_res_blocks=2, attn_resolutions=[8]),
    ),
}


class Case(NamedTuple):
    """A model of transformers, its directory, and the model directory that is imported from it."""

    theirs: Any
    hugging_face: Path
    ours: Path


def make(
    tokenizer: dict[str, Any], folder: Path, shape: str = "plain", dtype: torch.dtype | None = None, **vq_config: Any
) -> Any:
    """A Hugging Face directory with weights far from their initial ones, norms included."""
    import transformers

    defaults = dict(vocab_size=300, num_hidden_layers=2, max_position_embeddings=96, vq_config=VQ)
    special = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1, vocabulary_map=tokenizer["model"]["vocab"])
    torch.manual_seed(0)
    settings = defaults | special | SHAPES[shape]
    settings["vq_config"] = settings["vq_config"] | vq_config
    model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model.eval() if dtype is None else model.eval().to(dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="session")
def make_hugging_face(byte_level: dict[str, Any]) -> Callable[..., Any]:
    """(folder, shape="plain", dtype=None, **changes of the image tokenizer) -> the model, saved in the folder."""
    return partial(make, byte_level)


@pytest.fixture(scope="session", params=SHAPES)
def case(request: pytest.FixtureRequest, byte_level: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(byte_level, folder / "hf", request.param)
    import_hugging_face(folder / "hf", folder / "ours")
    return Case(theirs, folder / "hf", folder / "ours")


@pytest.fixture(scope="session")
def plain(byte_level: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, for tests that change a copy."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    make(byte_level, folder)
    return folder


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "hf"))
