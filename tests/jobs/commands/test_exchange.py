"""`calumma import` and `calumma export`: folders there and back, and errors that a person can act on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from calumma.jobs.commands.main import app
from calumma.model import load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.model.transformer import Transformer
from calumma.model.weights import INDEX

TEXTS = ["Which digit is this? Draw a seven.\n" * 5, "def f(x):\n    return x\n"]
SHAPE = ImageTokenizerConfig(
    resolution=16,
    codebook_size=16,
    embedding=8,
    base_channels=32,
    multipliers=[1, 2],
    residual_blocks=1,
    norm_groups=32,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    parts = tmp_path_factory.mktemp("parts")
    vocabulary = train_text_tokenizer(TEXTS, parts, vocabulary_size=340, image_codes=16)
    ImageTokenizer(SHAPE).save(parts / IMAGE_TOKENIZER)
    config = ModelConfig(
        vocabulary_size=vocabulary.size, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=96
    )
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, Transformer(config).initialize(0), parts, parts / IMAGE_TOKENIZER)
    return directory


@pytest.fixture(scope="module")
def hugging_face(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("there") / "hf"
    run("export", "hf", str(ours), str(folder))
    return folder


@pytest.fixture(scope="module")
def vqgan(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vqgan.ckpt and vqgan.yaml as Meta writes them."""
    folder = tmp_path_factory.mktemp("vqgan")
    state = {
        name.replace("codebook.", "quantize.embedding."): value
        for name, value in load_file(ours / IMAGE_TOKENIZER / "model.safetensors").items()
    }
    torch.save({"state_dict": state}, folder / "vqgan.ckpt")
    shape = {"z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2]}
    shape |= {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "double_z": False}
    params = {"embed_dim": 8, "n_embed": 16, "ddconfig": shape}
    (folder / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return folder


def run(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.output


def same_logits(one: Path, other: Path) -> bool:
    tokens = torch.arange(60)[None]
    return torch.equal(load(one).transformer(tokens), load(other).transformer(tokens))


def test_there_and_back(ours: Path, hugging_face: Path, tmp_path: Path) -> None:
    output = run("import", "hf", str(hugging_face), str(tmp_path / "back"))
    assert str(tmp_path / "back") in output
    assert "draws none: no decoder was given" in output
    assert same_logits(ours, tmp_path / "back")
    assert not load(tmp_path / "back").image_tokenizer.config.decoder


@pytest.mark.parametrize("how", ["folder", "file", "both files"])
def test_the_decoder_from_metas_files(ours: Path, hugging_face: Path, vqgan: Path, tmp_path: Path, how: str) -> None:
    words = {
        "folder": ["--vqgan", str(vqgan)],
        "file": ["--vqgan", str(vqgan / "vqgan.ckpt")],
        "both files": ["--vqgan", str(vqgan / "vqgan.ckpt"), "--vqgan-config", str(tmp_path / "named.yaml")],
    }
    shutil.copy(vqgan / "vqgan.yaml", tmp_path / "named.yaml")
    output = run("import", "hf", str(hugging_face), str(tmp_path / "back"), *words[how])
    assert "no decoder" not in output
    codes = torch.arange(64)[None] % 16
    expected = load(ours).image_tokenizer.decode(codes)
    assert torch.equal(load(tmp_path / "back").image_tokenizer.decode(codes), expected)


def test_weights_in_shards(ours: Path, tmp_path: Path) -> None:
    run("export", "hf", str(ours), str(tmp_path / "hf"), "--shard-gib", "0.00001")
    assert len(json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"]) > 30
    run("import", "hf", str(tmp_path / "hf"), str(tmp_path / "back"), "--shard-gib", "0.00001")
    assert (tmp_path / "back" / INDEX).is_file()
    assert same_logits(ours, tmp_path / "back")


def test_metas_release(ours: Path, hugging_face: Path, vqgan: Path, tmp_path: Path) -> None:
    source = tmp_path / "models" / "7b"
    source.mkdir(parents=True)
    shutil.copytree(vqgan, tmp_path / "tokenizer")
    shutil.copy(hugging_face / "tokenizer.json", tmp_path / "tokenizer" / "text_tokenizer.json")
    given = load(ours).transformer.state_dict()
    state = {"tok_embeddings.weight": given["embedding.weight"], "norm.weight": given["norm.weight"]}
    state["output.weight"] = given["output.weight"]
    for i in range(2):
        block = f"blocks.{i}"
        query, key, value = (given[f"{block}.attention.{name}.weight"] for name in ("query", "key", "value"))
        state[f"layers.{i}.attention.wqkv.weight"] = torch.cat([query, key, value])
        state[f"layers.{i}.attention.wo.weight"] = given[f"{block}.attention.output.weight"]
        gate, up = (given[f"{block}.feed_forward.{name}.weight"] for name in ("gate", "up"))
        state[f"layers.{i}.feed_forward.w13.weight"] = torch.cat([gate, up])
        state[f"layers.{i}.feed_forward.w2.weight"] = given[f"{block}.feed_forward.down.weight"]
        state[f"layers.{i}.attention_norm.weight"] = given[f"{block}.attention_norm.weight"]
        state[f"layers.{i}.ffn_norm.weight"] = given[f"{block}.feed_forward_norm.weight"]
        for letter, name in (("q", "query"), ("k", "key")):
            for part in ("weight", "bias"):
                norm = given[f"{block}.attention.{name}_norm.{part}"][0]
                state[f"layers.{i}.attention.{letter}_normalization.{part}"] = norm
    torch.save(state, source / "consolidated.pth")
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "qk_normalization": True}
    (source / "params.json").write_text(json.dumps({"model": shape}))
    run("import", "meta", str(source), str(tmp_path / "found"))
    run("import", "meta", str(source), str(tmp_path / "named"), "--tokenizer", str(tmp_path / "tokenizer"))
    assert same_logits(ours, tmp_path / "found")
    assert same_logits(ours, tmp_path / "named")
    assert load(tmp_path / "found").image_tokenizer.config.decoder


def test_errors_name_what_to_do(ours: Path, hugging_face: Path, vqgan: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(hugging_face, tmp_path / "hf"))
    weights = load_file(copy / "model.safetensors")
    weights["surprise"] = weights.pop("model.norm.weight")
    save_file(weights, copy / "model.safetensors")
    told = refused("import", "hf", str(copy), str(tmp_path / "out"))
    assert "1 missing: model.norm.weight; 1 unknown: surprise" in told
    assert "exists already" in refused("import", "hf", str(hugging_face), str(ours))
    assert "there is no folder" in refused("import", "hf", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert "no params.json" in refused(
        "import", "meta", str(hugging_face), str(tmp_path / "out"), "--tokenizer", str(vqgan)
    )
    assert "--tokenizer" in refused("import", "meta", str(hugging_face), str(tmp_path / "out"))
    assert "not a whole model directory" in refused("export", "hf", str(hugging_face), str(tmp_path / "out"))
    named = str(tmp_path / "lost.yaml")
    assert "lost.yaml cannot be read" in refused(
        "import", "hf", str(hugging_face), str(tmp_path / "out"), "--vqgan", str(vqgan), "--vqgan-config", named
    )
    Path(named).write_text("- a list")
    assert "holds no settings" in refused(
        "import", "hf", str(hugging_face), str(tmp_path / "out"), "--vqgan", str(vqgan), "--vqgan-config", named
    )
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = refused("export", "hf", str(ours), str(tmp_path / "file" / "hf"))
    assert "nothing was written to" in told
    assert "Not a directory" in told or "File exists" in told
