"""Exchange with Hugging Face, against models that transformers itself makes: same logits, same codes, same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calumma.model import Image, Text, generate, load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.convert import ConversionError, export_hugging_face, import_hugging_face
from calumma.model.convert.names import rows, shapes
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.document import Document
from calumma.model.generation import SamplingParams
from calumma.model.images import preprocess
from calumma.model.tokenizers.image import ImageTokenizer, MissingDecoder
from calumma.model.transformer import Transformer
from calumma.model.weights import INDEX, open_weights

transformers = pytest.importorskip("transformers")

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
    theirs: Any
    hugging_face: Path
    ours: Path


def make(settings: dict[str, Any], tokenizer: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A Hugging Face directory with weights far from their initial ones, norms included."""
    defaults = dict(vocab_size=300, num_hidden_layers=2, max_position_embeddings=96, vq_config=VQ)
    special = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1, vocabulary_map=tokenizer["model"]["vocab"])
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(**defaults | special | settings)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = model.eval() if dtype is None else model.eval().to(dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture(scope="session", params=SHAPES)
def case(request: pytest.FixtureRequest, byte_level: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(SHAPES[request.param], byte_level, folder / "hf")
    import_hugging_face(folder / "hf", folder / "ours")
    return Case(theirs, folder / "hf", folder / "ours")


@pytest.fixture(scope="session")
def plain(byte_level: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory, for tests that change a copy."""
    folder = tmp_path_factory.mktemp("plain") / "hf"
    make(SHAPES["plain"], byte_level, folder)
    return folder


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "hf"))


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """All of them: transformers' forward hides those of image ids."""
    with torch.no_grad():
        return model.lm_head(model.model(tokens_BT)[0])


def some_tokens(case: Case) -> Tensor:
    size = case.theirs.config.vocab_size
    return torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(1))


def test_imported_logits_are_the_same(case: Case) -> None:
    tokens = some_tokens(case)
    theirs = logits(case.theirs, tokens)
    with torch.no_grad():
        assert torch.allclose(load(case.ours).transformer(tokens), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_imported_image_codes_are_the_same(case: Case) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    ours = load(case.ours)
    with torch.no_grad():
        theirs = case.theirs.get_image_tokens(images)
    assert torch.equal(torch.tensor(ours.vocabulary.image_codes)[ours.image_tokenizer.encode(images)], theirs.long())
    assert len(theirs.unique()) > 2


def test_exported_logits_and_codes_are_the_same(case: Case, tmp_path: Path) -> None:
    export_hugging_face(case.ours, tmp_path / "hf")
    loaded, told = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()), told
    assert torch.equal(logits(loaded, some_tokens(case)), logits(case.theirs, some_tokens(case)))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.get_image_tokens(images), case.theirs.get_image_tokens(images))


def test_export_import_export_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    export_hugging_face(case.ours, tmp_path / "first")
    import_hugging_face(tmp_path / "first", tmp_path / "ours")
    export_hugging_face(tmp_path / "ours", tmp_path / "second")
    names = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "second") for p in (tmp_path / "second").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    for name in ("model.safetensors", f"{IMAGE_TOKENIZER}/model.safetensors", "config.json", "vocabulary.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (case.ours / name).read_bytes(), name
    original, exported = (load_file(path / "model.safetensors") for path in (case.hugging_face, tmp_path / "first"))
    assert original.keys() == exported.keys()
    assert all(torch.equal(original[name], exported[name]) for name in original)


def test_the_exported_processor_makes_what_our_encoder_makes(case: Case, tmp_path: Path) -> None:
    export_hugging_face(case.ours, tmp_path / "hf")
    processor = transformers.ChameleonProcessor.from_pretrained(tmp_path / "hf")
    ours = load(case.ours)
    picture = preprocessed_alike()
    made = processor(images=[picture], text="Draw a<image> seven", return_tensors="pt")
    pixels = preprocess(picture, 16)[None]
    assert torch.allclose(made["pixel_values"], pixels, atol=1e-5)
    ids = made["input_ids"][0].tolist()
    v = ours.vocabulary
    placeholder = processor.image_token_id
    text = [ours.text_tokenizer.encode(part) for part in ("Draw a", " seven")]
    grid = [v.begin_image, *[placeholder] * ours.image_length, v.end_image]
    assert ids == [v.bos, *text[0], *grid, *text[1], v.end_turn]
    document = Document((Text("Draw a"), Image(picture), Text(" seven")))
    codes = case.theirs.get_image_tokens(made["pixel_values"])[0].tolist()
    assert ours.encode(document, complete=False) == [
        v.bos, *text[0], v.begin_image, *codes, v.end_image, *text[1]
    ]  # fmt: skip


def preprocessed_alike() -> Any:
    import numpy as np
    from PIL import Image as PILImage

    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return PILImage.fromarray(values)


def test_a_model_of_ours_is_exported(byte_level: dict[str, Any], model_directory: Path, tmp_path: Path) -> None:
    """Trained here: sentencepiece, an image tokenizer with its decoder, no reserved ids."""
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        resolution=16, codebook_size=32, embedding=8, base_channels=32, multipliers=[1, 2], residual_blocks=1
    )
    with pytest.raises(ConversionError, match="normalizes the image tokenizer in 32 groups"):
        export_hugging_face(save(shape, model_directory, tmp_path / "few"), tmp_path / "hf")
    directory = save(shape.model_copy(update={"norm_groups": 32}), model_directory, tmp_path / "model")
    export_hugging_face(directory, tmp_path / "hf")
    loaded = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ours = load(directory)
    tokens = torch.randint(400, (2, 30))
    with torch.no_grad():
        assert torch.allclose(ours.transformer(tokens), logits(loaded, tokens), atol=1e-4, rtol=0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = torch.tensor(ours.vocabulary.image_codes)[ours.image_tokenizer.encode(images)]
    assert torch.equal(codes, loaded.get_image_tokens(images).long())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("Draw a seven")["input_ids"] == ours.encode(Document((Text("Draw a seven"),)), complete=False)
    import_hugging_face(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def save(shape: ImageTokenizerConfig, tokenizer: Path, directory: Path) -> Path:
    parts = directory.with_name(f"{directory.name}-parts")
    ImageTokenizer(shape).save(parts)
    config = ModelConfig(vocabulary_size=400, layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=64)
    save_model(directory, Transformer(config).initialize(0), tokenizer, parts)
    return directory


def test_every_tensor_of_ours_is_in_the_table() -> None:
    for query_key_norm in (True, False):
        config = ModelConfig(
            vocabulary_size=8, layers=2, width=8, heads=2, kv_heads=1, ffn_width=8, query_key_norm=query_key_norm
        )
        assert sorted(row.ours for row in rows(config)) == sorted(shapes(config))


# --- dtype, shards, memory ------------------------------------------------------------------------------------------


def test_the_dtype_is_kept(byte_level: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(SHAPES["grouped"], byte_level, tmp_path / "hf", torch.bfloat16)
    import_hugging_face(tmp_path / "hf", tmp_path / "ours")
    for directory in (tmp_path / "ours", tmp_path / "ours" / IMAGE_TOKENIZER):
        assert {entry.dtype for entry in open_weights(directory).values()} == {torch.bfloat16}
    model = load(tmp_path / "ours")
    assert model.transformer.output.weight.dtype == torch.bfloat16
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(model.transformer(tokens), logits(theirs, tokens).float(), atol=0.05)
    # pictures are coded in float32 all the same
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = theirs.model.vqmodel.float().encode(images).image_tokens
    assert torch.equal(model.image_tokenizer.encode(images).flatten(), codes)
    export_hugging_face(tmp_path / "ours", tmp_path / "again")
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.bfloat16


def test_shards_are_read_and_written(plain: Path, tmp_path: Path) -> None:
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(plain)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    shutil.copy(plain / "tokenizer.json", tmp_path / "hf")
    assert (tmp_path / "hf" / INDEX).is_file()
    import_hugging_face(tmp_path / "hf", tmp_path / "sharded", shard_bytes=20_000)
    import_hugging_face(plain, tmp_path / "whole")
    assert (tmp_path / "sharded" / INDEX).is_file()
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = load(tmp_path / "whole").transformer(tokens)
        assert torch.equal(load(tmp_path / "sharded").transformer(tokens), expected)
    export_hugging_face(tmp_path / "sharded", tmp_path / "exported", shard_bytes=20_000)
    loaded = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    next((tmp_path / "sharded").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of"):
        load(tmp_path / "sharded")


def test_progress_counts_bytes(plain: Path, tmp_path: Path) -> None:
    told: list[tuple[float, float, str]] = []
    import_hugging_face(plain, tmp_path / "ours", progress=lambda *step: told.append(step))
    assert told[-1][0] == told[-1][1] == sum(entry.bytes for entry in open_weights(tmp_path / "ours").values())
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {name for _, _, name in told} == set(open_weights(tmp_path / "ours"))


# --- the decoder of images ------------------------------------------------------------------------------------------


def vqgan(model: Any, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Meta's vqgan.ckpt and settings for a model of transformers, with a decoder of random weights."""
    torch.manual_seed(5)
    config = ImageTokenizerConfig(
        resolution=16,
        codebook_size=16,
        embedding=8,
        base_channels=32,
        multipliers=[1, 2],
        residual_blocks=1,
        norm_groups=32,
    )
    decoder = {
        f"decoder.{name}": value for name, value in (ImageTokenizer(config).decoder or nn.Module()).state_dict().items()
    }
    state = dict(model.model.vqmodel.state_dict()) | decoder | {"loss.discriminator.main.0.weight": torch.ones(3)}
    torch.save({"state_dict": state, "epoch": 3}, folder / "vqgan.ckpt")
    shape = dict(
        double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2], num_res_blocks=1,
        attn_resolutions=[], dropout=0.0,
    )  # fmt: skip
    params = {"embed_dim": 8, "n_embed": 16, "ddconfig": shape, "lossconfig": {"target": "none"}, "ckpt_path": "x"}
    return folder / "vqgan.ckpt", {"model": {"params": params}}


def test_without_a_decoder_images_are_read_and_not_drawn(case: Case) -> None:
    model = load(case.ours)
    with pytest.raises(MissingDecoder, match=r"has no decoder.*--vqgan"):
        model.image_tokenizer.decode(torch.zeros(1, model.image_length, dtype=torch.long))


def test_without_a_decoder_text_is_generated_and_images_are_understood(case: Case) -> None:
    model = load(case.ours)
    prompts = [Document((Text("Which digit is this?", "user"),)), Document((Text("Draw", "user"),))]
    prompts.append(Document((Image(preprocessed_alike(), role="user"),)))
    for mode in ("text", "interleaved"):  # which is text, then, and never fails half-way
        params = SamplingParams(max_tokens=8, mode=mode, seed=0)
        answers = generate(model, prompts, params)
        assert [answer.images for answer in answers] == [[]] * len(prompts)
    with pytest.raises(MissingDecoder, match="cannot draw"):
        generate(model, prompts, SamplingParams(mode="image"))


def test_the_decoder_comes_from_metas_file(plain: Path, tmp_path: Path) -> None:
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(plain)
    checkpoint, settings = vqgan(theirs, tmp_path)
    import_hugging_face(plain, tmp_path / "ours", checkpoint, settings)
    model = load(tmp_path / "ours")
    codes = torch.randint(16, (2, 64))
    assert model.image_tokenizer.decode(codes).shape == (2, 3, 16, 16)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = theirs.model.vqmodel.encode(images).image_tokens
    assert torch.equal(model.image_tokenizer.encode(images).flatten(), expected)


def test_the_decoder_of_another_image_tokenizer_is_refused(plain: Path, tmp_path: Path) -> None:
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(plain)
    nn.init.normal_(theirs.model.vqmodel.quantize.embedding.weight)
    checkpoint, settings = vqgan(theirs, tmp_path)
    with pytest.raises(ConversionError, match=r"not the image tokenizer of this model: codebook\.weight differs"):
        import_hugging_face(plain, tmp_path / "ours", checkpoint, settings)
    settings["model"]["params"]["ddconfig"]["resolution"] = 32
    with pytest.raises(ConversionError, match="of another shape"):
        import_hugging_face(plain, tmp_path / "ours", checkpoint, settings)


# --- what cannot be converted ---------------------------------------------------------------------------------------


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def test_missing_and_unknown_names_are_listed(copy: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.1.self_attn.q_norm.bias"]
        del weights["lm_head.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # known, and not needed

    changed(copy, change)
    with pytest.raises(ConversionError) as told:
        import_hugging_face(copy, tmp_path / "ours")
    assert "2 missing: lm_head.weight, model.layers.1.self_attn.q_norm.bias" in str(told.value)
    assert "1 unknown: model.layers.0.self_attn.q_proj.bias" in str(told.value)
    assert "inv_freq" not in str(told.value)


def test_missing_names_of_the_image_tokenizer_are_listed(copy: Path, tmp_path: Path) -> None:
    changed(copy, lambda weights: weights.pop("model.vqmodel.quant_conv.weight"))
    with pytest.raises(ConversionError, match=r"1 missing: model\.vqmodel\.quant_conv\.weight"):
        import_hugging_face(copy, tmp_path / "ours")


def test_other_shapes_are_listed(copy: Path, tmp_path: Path) -> None:
    changed(copy, lambda weights: weights.update({"lm_head.weight": torch.zeros(300, 31)}))
    with pytest.raises(ConversionError, match=r"output\.weight \[300, 31\] instead of \[300, 32\]"):
        import_hugging_face(copy, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"num_attention_heads": 3}, "a model that cannot be"),
        ({"vq_config": VQ | {"double_latent": True}}, "double_latent True"),
        ({"vq_config": VQ | {"num_embeddings": 0}}, "a VQGAN that cannot be"),
    ],
)
def test_other_architectures_are_refused(copy: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ConversionError, match=told):
        import_hugging_face(copy, tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_broken_file_is_named(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_text("broken")
    with pytest.raises(ConversionError, match=name):
        import_hugging_face(copy, tmp_path / "ours")
    (copy / name).unlink()
    with pytest.raises(ConversionError, match=name):
        import_hugging_face(copy, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_codebook_of_another_size_is_refused(copy: Path, byte_level: dict[str, Any], tmp_path: Path) -> None:
    make(SHAPES["plain"] | {"vq_config": VQ | {"num_embeddings": 12}}, byte_level, tmp_path / "other")
    with pytest.raises(ConversionError, match="16 image codes, the codebook 12"):
        import_hugging_face(tmp_path / "other", tmp_path / "ours")


def test_an_incomplete_model_directory_is_not_exported(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.ours, tmp_path / "ours")
    (tmp_path / "ours" / "vocabulary.json").unlink()
    with pytest.raises(ConversionError, match=r"vocabulary\.json missing"):
        export_hugging_face(tmp_path / "ours", tmp_path / "hf")


def test_a_model_without_query_key_norm_is_not_exported(model_directory: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        vocabulary_size=400, layers=1, width=16, heads=2, kv_heads=2, ffn_width=16, query_key_norm=False
    )
    save_model(
        tmp_path / "model", Transformer(config).initialize(0), model_directory, model_directory / IMAGE_TOKENIZER
    )
    with pytest.raises(ConversionError, match="without query-key normalization"):
        export_hugging_face(tmp_path / "model", tmp_path / "hf")


# --- all or nothing -------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop(done: float, total: float, name: str) -> None:
    if done > total / 2:
        raise Stopped


def test_an_interrupted_conversion_leaves_nothing(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        import_hugging_face(case.hugging_face, tmp_path / "out" / "ours", progress=stop)
    with pytest.raises(Stopped):
        export_hugging_face(case.ours, tmp_path / "out" / "hf", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(case: Case, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    import_hugging_face(case.hugging_face, tmp_path / "ours")  # an empty folder is as good as none
    load(tmp_path / "ours")
    with pytest.raises(ConversionError, match="exists already"):
        import_hugging_face(case.hugging_face, tmp_path / "ours")
    with pytest.raises(ConversionError, match="exists already"):
        export_hugging_face(case.ours, tmp_path / "ours" / "config.json")
