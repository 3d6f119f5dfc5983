"""Meta's release, written here by its naming: any number of shards, fused or not, becomes one model directory.

The same weights go into transformers' model by the formulas of its own conversion script; the logits must agree.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calumma.model import load
from calumma.model.config import ImageTokenizerConfig
from calumma.model.convert import ConversionError, export_hugging_face, import_meta
from calumma.model.convert.meta import tokenizer_folder
from calumma.model.directory import IMAGE_TOKENIZER
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.weights import INDEX, open_weights

transformers = pytest.importorskip("transformers")

DIM, HEAD, FFN, LAYERS, VOCABULARY = 64, 8, 48, 2, 304
HEADS = DIM // HEAD
SHAPE = ImageTokenizerConfig(
    resolution=16,
    codebook_size=16,
    embedding=8,
    base_channels=32,
    multipliers=[1, 2],
    residual_blocks=1,
    latent_channels=8,
    norm_groups=32,
)
VQGAN_YAML: dict[str, Any] = {
    "model": {
        "base_learning_rate": 4.5e-6,
        "params": {
            "embed_dim": 8,
            "n_embed": 16,
            "monitor": "val/rec_loss",
            "ckpt_path": "none",
            "ddconfig": {
                "double_z": False,
                "z_channels": 8,
                "resolution": 16,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
        },
    }
}


def shards(parallel: int, kv_heads: int, fused: bool, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Random weights of a model trained on `parallel` GPUs: what each of them held."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.3).to(dtype)

    held: list[dict[str, Tensor]] = [{} for _ in range(parallel)]
    norms = {f"layers.{i}.{name}.weight": random(DIM) for i in range(LAYERS) for name in ("attention_norm", "ffn_norm")}
    norms["norm.weight"] = random(DIM)
    for own in held:
        own |= {name: value.clone() for name, value in norms.items()}
        own["tok_embeddings.weight"] = random(VOCABULARY, DIM // parallel)
        own["output.weight"] = random(VOCABULARY // parallel, DIM)
        own["rope.freqs"] = random(HEAD // 2)
        for i in range(LAYERS):
            at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
            wq, wk, wv = (random(n // parallel * HEAD, DIM) for n in (HEADS, kv_heads, kv_heads))
            w1, w3 = random(FFN // parallel, DIM), random(FFN // parallel, DIM)
            if fused:
                own[f"{at}.wqkv.weight"], own[f"{ff}.w13.weight"] = torch.cat([wq, wk, wv]), torch.cat([w1, w3])
            else:
                own |= {f"{at}.wq.weight": wq, f"{at}.wk.weight": wk, f"{at}.wv.weight": wv}
                own |= {f"{ff}.w1.weight": w1, f"{ff}.w3.weight": w3}
            own[f"{at}.wo.weight"] = random(DIM, HEADS // parallel * HEAD)
            own[f"{ff}.w2.weight"] = random(DIM, FFN // parallel)
            for name in ("q_normalization", "k_normalization"):
                own |= {f"{at}.{name}.weight": random(HEAD) + 1, f"{at}.{name}.bias": random(HEAD)}
    return held


def params(kv_heads: int, swin: bool, **more: Any) -> dict[str, Any]:
    model = {
        "dim": DIM,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": kv_heads if kv_heads != HEADS else None,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "qk_normalization": True,
        "swin_norm": swin,
        "vocab_size": -1,
    }
    return {"model_parallel_size": 8, "seed": 1, "model": model | more}


def release(
    folder: Path,
    tokenizer: dict[str, Any],
    held: list[dict[str, Tensor]],
    settings: dict[str, Any],
    legacy: bool = False,
) -> Path:
    """The release's download: models/NAME with the weights and tokenizer/ with the rest. Returns models/NAME."""
    source, beside = folder / "models" / "7b", folder / "tokenizer"
    source.mkdir(parents=True)
    beside.mkdir()
    (source / "params.json").write_text(json.dumps(settings))
    (source / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": len(held)}))
    for rank, own in enumerate(held):
        name = "consolidated.pth" if len(held) == 1 else f"consolidated.{rank:02d}.pth"
        torch.save(own, source / name, _use_new_zipfile_serialization=not legacy)
    (beside / "text_tokenizer.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(3)
    image = ImageTokenizer(SHAPE)
    for parameter in image.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {name.replace("codebook.", "quantize.embedding."): value for name, value in image.state_dict().items()}
    losses = {"loss.discriminator.main.0.weight": torch.ones(4), "loss.perceptual_loss.lin0.weight": torch.ones(4)}
    torch.save({"state_dict": state | losses, "global_step": 7}, beside / "vqgan.ckpt")
    return source


def of_transformers(held: list[dict[str, Tensor]], kv_heads: int, swin: bool, vocabulary: dict[str, int]) -> Any:
    """transformers' model with the shards' weights, by the formulas of its convert_chameleon_weights_to_hf.py."""
    config = transformers.ChameleonConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        swin_norm=swin,
        vocabulary_map=vocabulary,
        vq_config=dict(resolution=16, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1),
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    parallel = len(held)

    def cat(name: str, dim: int) -> Tensor:
        return torch.cat([own[name] for own in held], dim)

    def permute(w: Tensor, heads: int) -> Tensor:
        return w.view(heads, HEAD // 2, 2, DIM).transpose(1, 2).reshape(heads * HEAD, DIM)

    def norm(name: str, heads: int) -> Tensor:
        each = torch.stack([own[name] for own in held]).view(parallel, HEAD // 2, 2).transpose(1, 2)
        return each.reshape(parallel, -1).repeat_interleave(heads // parallel, 0)

    state = {
        "model.embed_tokens.weight": cat("tok_embeddings.weight", 1),
        "model.norm.weight": held[0]["norm.weight"],
        "lm_head.weight": cat("output.weight", 0),
    }
    for i in range(LAYERS):
        hf, meta = f"model.layers.{i}", f"layers.{i}"
        state |= {
            f"{hf}.self_attn.q_proj.weight": permute(cat(f"{meta}.attention.wq.weight", 0), HEADS),
            f"{hf}.self_attn.k_proj.weight": permute(cat(f"{meta}.attention.wk.weight", 0), kv_heads),
            f"{hf}.self_attn.v_proj.weight": cat(f"{meta}.attention.wv.weight", 0),
            f"{hf}.self_attn.o_proj.weight": cat(f"{meta}.attention.wo.weight", 1),
            f"{hf}.mlp.gate_proj.weight": cat(f"{meta}.feed_forward.w1.weight", 0),
            f"{hf}.mlp.up_proj.weight": cat(f"{meta}.feed_forward.w3.weight", 0),
            f"{hf}.mlp.down_proj.weight": cat(f"{meta}.feed_forward.w2.weight", 1),
            f"{hf}.input_layernorm.weight": held[0][f"{meta}.attention_norm.weight"],
            f"{hf}.post_attention_layernorm.weight": held[0][f"{meta}.ffn_norm.weight"],
        }
        for part in ("weight", "bias"):
            state[f"{hf}.self_attn.q_norm.{part}"] = norm(f"{meta}.attention.q_normalization.{part}", HEADS)
            state[f"{hf}.self_attn.k_norm.{part}"] = norm(f"{meta}.attention.k_normalization.{part}", kv_heads)
    told = model.load_state_dict(state, strict=False)
    assert not told.unexpected_keys
    assert all(name.startswith("model.vqmodel.") for name in told.missing_keys)
    return model


@pytest.mark.parametrize("swin", [False, True], ids=["pre", "swin"])
@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize(("parallel", "kv_heads"), [(1, 8), (1, 2), (2, 8), (2, 2), (4, 8), (4, 4)])
def test_logits_are_those_of_transformers(
    byte_level: dict[str, Any], tmp_path: Path, parallel: int, kv_heads: int, fused: bool, swin: bool
) -> None:
    held = shards(parallel, kv_heads, fused)
    source = release(tmp_path, byte_level, held, params(kv_heads, swin))
    import_meta(source, tmp_path / "ours", tokenizer_folder(source), VQGAN_YAML)
    model = load(tmp_path / "ours")
    plain = shards(parallel, kv_heads, fused=False)
    theirs = of_transformers(plain, kv_heads, swin, byte_level["model"]["vocab"])
    tokens = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.lm_head(theirs.model(tokens)[0])
        assert torch.allclose(model.transformer(tokens), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1
    export_hugging_face(tmp_path / "ours", tmp_path / "hf")
    exported = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(exported.lm_head(exported.model(tokens)[0]), expected)


def test_image_tokenizer_and_vocabulary_are_the_releases(byte_level: dict[str, Any], tmp_path: Path) -> None:
    source = release(tmp_path, byte_level, shards(2, 8, True), params(8, False))
    import_meta(source, tmp_path / "ours", tmp_path / "tokenizer", VQGAN_YAML)
    model = load(tmp_path / "ours")
    state = torch.load(tmp_path / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.image_tokenizer.codebook.weight, state["quantize.embedding.weight"])
    assert model.image_tokenizer.decode(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 3, 16, 16)
    ids = byte_level["model"]["vocab"]
    vocabulary = model.vocabulary
    assert (vocabulary.size, vocabulary.begin_image, vocabulary.end_turn) == (
        VOCABULARY,
        ids["<racm3:break>"],
        ids["<reserved08706>"],
    )
    assert vocabulary.reserved[-4:] == [300, 301, 302, 303]  # rows of the embedding that no name has
    assert model.text_tokenizer.decode(model.text_tokenizer.encode("Draw a seven")) == "Draw a seven"
    config = model.config
    assert (config.heads, config.ffn_width, config.context, config.query_key_norm) == (HEADS, FFN, 4096, True)


def test_dtype_is_kept_and_shards_are_written(byte_level: dict[str, Any], tmp_path: Path) -> None:
    source = release(tmp_path, byte_level, shards(4, 8, False, torch.bfloat16), params(8, True))
    told: list[float] = []
    import_meta(
        source, tmp_path / "ours", tmp_path / "tokenizer", VQGAN_YAML, 30_000, lambda *step: told.append(step[0])
    )
    weights = open_weights(tmp_path / "ours")
    assert {entry.dtype for entry in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "ours" / INDEX).is_file()
    assert told[-1] == sum(entry.bytes for entry in weights.values())
    load(tmp_path / "ours")


def test_norms_that_drifted_apart_become_their_mean(byte_level: dict[str, Any], tmp_path: Path) -> None:
    held = shards(2, 8, True)
    held[0]["norm.weight"], held[1]["norm.weight"] = torch.zeros(DIM), torch.ones(DIM)
    source = release(tmp_path, byte_level, held, params(8, False))
    import_meta(source, tmp_path / "ours", tmp_path / "tokenizer", VQGAN_YAML)
    assert torch.equal(load(tmp_path / "ours").transformer.norm.weight, torch.full((DIM,), 0.5))


def test_a_model_without_query_key_norm(byte_level: dict[str, Any], tmp_path: Path) -> None:
    held = [{name: value for name, value in own.items() if "_normalization" not in name} for own in shards(2, 8, True)]
    source = release(tmp_path, byte_level, held, params(8, False, qk_normalization=False))
    import_meta(source, tmp_path / "ours", tmp_path / "tokenizer", VQGAN_YAML)
    assert not load(tmp_path / "ours").config.query_key_norm


def test_files_of_an_old_pytorch_are_read(byte_level: dict[str, Any], tmp_path: Path) -> None:
    """They cannot be mapped into memory."""
    source = release(tmp_path, byte_level, shards(2, 8, False), params(8, False), legacy=True)
    import_meta(source, tmp_path / "ours", tmp_path / "tokenizer", VQGAN_YAML)
    assert load(tmp_path / "ours").config.width == DIM


# --- what cannot be imported ----------------------------------------------------------------------------------------


@pytest.fixture
def source(byte_level: dict[str, Any], tmp_path: Path) -> Path:
    return release(tmp_path, byte_level, shards(2, 8, True), params(8, False))


def refused(source: Path, told: str, settings: dict[str, Any] = VQGAN_YAML) -> None:
    ours = source.parents[1] / "ours"
    with pytest.raises(ConversionError, match=told):
        import_meta(source, ours, source.parents[1] / "tokenizer", settings)
    assert not ours.exists()
    assert not list(source.parents[1].glob(".ours*"))


def rewrite(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_shard(path: Path, drop: tuple[str, ...] = (), **add: Tensor) -> None:
    loaded = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in loaded.items() if name not in drop} | add, path)


def test_missing_and_unknown_names_are_listed(source: Path) -> None:
    for path in source.glob("*.pth"):
        change_shard(path, ("layers.1.feed_forward.w2.weight", "norm.weight"), extra=torch.ones(2))
    refused(source, r"2 missing: layers\.1\.feed_forward\.w2\.weight, norm\.weight; 1 unknown: extra")


def test_shards_must_hold_the_same_names(source: Path) -> None:
    change_shard(source / "consolidated.01.pth", ("norm.weight",))
    refused(source, r"consolidated\.01\.pth, beside consolidated\.00\.pth: .*1 missing: norm\.weight")


def test_a_missing_shard_is_named(source: Path) -> None:
    (source / "consolidated.01.pth").unlink()
    refused(source, r"consolidated\.01\.pth missing")
    (source / "consolidate_params.json").unlink()
    (source / "consolidated.00.pth").rename(source / "consolidated.02.pth")
    refused(source, r"consolidated\.00\.pth, consolidated\.01\.pth missing")


def test_more_shards_than_the_parameters_say(source: Path) -> None:
    rewrite(source / "consolidate_params.json", model_parallel_size=1)
    refused(source, "says 1 shards, and there are 2")


def test_no_weights_at_all(source: Path) -> None:
    for path in source.glob("*.pth"):
        path.unlink()
    refused(source, r"neither consolidated\.pth nor consolidated\.00\.pth")


def test_other_widths_than_the_parameters_say_are_listed(source: Path) -> None:
    model = json.loads((source / "params.json").read_text())["model"]
    rewrite(source / "params.json", model=model | {"dim": 128})
    refused(source, r"embedding\.weight \[304, 64\] instead of \[304, 128\]|rows instead of")


@pytest.mark.parametrize(
    ("change", "told"),
    [({"n_heads": 7}, "a model that cannot be"), ({"n_kv_heads": 1}, "1 heads cannot lie in 2 shards")],
)
def test_impossible_parameters(source: Path, change: dict[str, Any], told: str) -> None:
    model = json.loads((source / "params.json").read_text())["model"]
    rewrite(source / "params.json", model=model | change)
    refused(source, told)


def test_parameters_that_say_too_little(source: Path) -> None:
    rewrite(source / "params.json", model={"dim": 64})
    refused(source, r"params\.json says no n_layers")


def test_no_code_of_a_checkpoint_is_run(source: Path) -> None:
    torch.save({"norm.weight": Path("/")}, source / "consolidated.00.pth")
    refused(source, r"consolidated\.00\.pth is not a checkpoint that can be read safely")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "is not a VQGAN configuration"),
        ({"model": {"params": VQGAN_YAML["model"]["params"] | {"n_embed": 32}}}, "shapes that its configuration"),
    ],
)
def test_a_wrong_vqgan_configuration(source: Path, settings: dict[str, Any], told: str) -> None:
    refused(source, told, settings)


def test_an_image_tokenizer_without_decoder_is_incomplete(source: Path) -> None:
    path = source.parents[1] / "tokenizer" / "vqgan.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": {k: v for k, v in state.items() if not k.startswith("decoder.")}}, path)
    refused(source, r"missing: decoder\.conv_in\.bias")


def test_the_tokenizers_are_found_in_three_places(source: Path, tmp_path: Path) -> None:
    assert tokenizer_folder(source).resolve() == (tmp_path / "tokenizer").resolve()
    (source / "tokenizer").mkdir()
    shutil.copy(tmp_path / "tokenizer" / "text_tokenizer.json", source / "tokenizer")
    assert tokenizer_folder(source) == source / "tokenizer"
    shutil.copy(tmp_path / "tokenizer" / "text_tokenizer.json", source)
    assert tokenizer_folder(source) == source
    with pytest.raises(ConversionError, match=r"no text_tokenizer\.json in .*--tokenizer"):
        tokenizer_folder(tmp_path / "a" / "b" / "c")


def test_an_interrupted_import_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: float, total: float, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_meta(source, tmp_path / "out" / "ours", tmp_path / "tokenizer", VQGAN_YAML, progress=stop)
    assert list((tmp_path / "out").iterdir()) == []
    import_meta(source, tmp_path / "out" / "ours", tmp_path / "tokenizer", VQGAN_YAML)
    assert (tmp_path / "out" / "ours" / IMAGE_TOKENIZER).is_dir()
