"""Exchange with Hugging Face, against models that transformers itself makes: same logits, same codes, same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def logits(model: Any, tokens_BT: Tensor) -> Tensor:
    """All of them: transformers' forward hides those of image ids."""
    with torch.no_grad():
        return model.lm_head(model.model(tokens_BT)[0])


def some_tokens(case: Any) -> Tensor:
    size = case.theirs.config.vocab_size
    return torch.randint(size, (2, 40), generator=torch.Generator().manual_seed(1))


def test_imported_logits_are_the_same(case: Any) -> None:
    tokens = some_tokens(case)
    theirs = logits(case.theirs, tokens)
    with torch.no_grad():
        assert torch.allclose(load(case.ours).transformer(tokens), theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_imported_image_codes_are_the_same(case: Any) -> None:
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    ours = load(case.ours)
    with torch.no_grad():
        theirs = case.theirs.get_image_tokens(images)
    assert torch.equal(torch.tensor(ours.vocabulary.image_codes)[ours.image_tokenizer.encode(images)], theirs.long())
    assert len(theirs.unique()) > 2


def test_exported_logits_and_codes_are_the_same(case: Any, tmp_path: Path) -> None:
    export_hugging_face(case.ours, tmp_path / "hf")
    loaded, told = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(told.values()), told
    assert torch.equal(logits(loaded, some_tokens(case)), logits(case.theirs, some_tokens(case)))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.get_image_tokens(images), case.theirs.get_image_tokens(images))


def test_export_import_export_gives_the_same_bytes(case: Any, tmp_path: Path) -> None:
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


def test_the_exported_processor_makes_what_our_encoder_makes(case: Any, tmp_path: Path) -> None:
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
    biases = {"query_key_value_bias": True, "attention_output_bias": True, "feed_forward_bias": True}
    others: list[dict[str, Any]] = [{}, {"query_key_norm": False}, {"query_key_norm": "rms", "tied": True}, biases]
    for changes in others:
        config = ModelConfig(vocabulary_size=8, layers=2, width=8, heads=2, kv_heads=1, ffn_width=8, **changes)
        assert sorted(row.ours for row in rows(config)) == sorted(shapes(config))


# --- dtype, shards, memory ------------------------------------------------------------------------------------------


def test_the_dtype_is_kept(make_hugging_face: Callable[..., Any], tmp_path: Path) -> None:
    theirs = make_hugging_face(tmp_path / "hf", "grouped", torch.bfloat16)
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


def test_without_a_decoder_images_are_read_and_not_drawn(case: Any) -> None:
    model = load(case.ours)
    with pytest.raises(MissingDecoder, match=r"has no decoder.*--vqgan"):
        model.image_tokenizer.decode(torch.zeros(1, model.image_length, dtype=torch.long))


def test_without_a_decoder_text_is_generated_and_images_are_understood(case: Any) -> None:
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


# --- folders as others publish them ---------------------------------------------------------------------------------


def test_a_decoder_within_the_folder_is_imported(plain: Path, tmp_path: Path) -> None:
    """Anole's layout: all of VQGAN under `model.vqmodel`."""
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(plain)
    checkpoint, settings = vqgan(theirs, tmp_path)
    import_hugging_face(plain, tmp_path / "expected", checkpoint, settings)
    anole = Path(shutil.copytree(plain, tmp_path / "anole"))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    decoder = {f"model.vqmodel.{name}": value for name, value in state.items() if name.startswith("decoder.")}
    save_file(load_file(anole / "model.safetensors") | decoder, anole / "model.safetensors", {"format": "pt"})
    assert import_hugging_face(anole, tmp_path / "ours")
    for name in ("config.json", "model.safetensors"):
        ours, expected = (tmp_path / each / IMAGE_TOKENIZER / name for each in ("ours", "expected"))
        assert ours.read_bytes() == expected.read_bytes()
    import_hugging_face(anole, tmp_path / "both", checkpoint, settings)
    assert (tmp_path / "both/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()


def test_a_folder_without_an_image_tokenizer_takes_metas(plain: Path, tmp_path: Path) -> None:
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(plain)
    checkpoint, settings = vqgan(theirs, tmp_path)
    import_hugging_face(plain, tmp_path / "expected", checkpoint, settings)
    bare = Path(shutil.copytree(plain, tmp_path / "bare"))
    kept = {k: v for k, v in load_file(bare / "model.safetensors").items() if not k.startswith("model.vqmodel.")}
    save_file(kept, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"has no image tokenizer .*--vqgan"):
        import_hugging_face(bare, tmp_path / "ours")
    import_hugging_face(bare, tmp_path / "ours", checkpoint, settings)
    for name in ("model.safetensors", f"{IMAGE_TOKENIZER}/model.safetensors", f"{IMAGE_TOKENIZER}/config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_another_separator_is_what_the_tokenizers_configuration_names(plain: Path, tmp_path: Path) -> None:
    import json

    renamed = Path(shutil.copytree(plain, tmp_path / "renamed"))
    content = (renamed / "tokenizer.json").read_text().replace("<reserved08706>", "<turn>")
    (renamed / "tokenizer.json").write_text(content)
    with pytest.raises(ConversionError, match=r"missing: <reserved08706>; sep_token in tokenizer_config\.json"):
        import_hugging_face(renamed, tmp_path / "ours")
    (renamed / "tokenizer_config.json").write_text(json.dumps({"sep_token": {"content": "<turn>"}}))
    import_hugging_face(renamed, tmp_path / "ours")
    import_hugging_face(plain, tmp_path / "expected")
    assert (tmp_path / "ours/vocabulary.json").read_bytes() == (tmp_path / "expected/vocabulary.json").read_bytes()
    export_hugging_face(tmp_path / "ours", tmp_path / "exported")
    assert "<reserved08706>" in (tmp_path / "exported/tokenizer.json").read_text()
