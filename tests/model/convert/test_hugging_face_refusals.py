"""What cannot be exchanged with Hugging Face is refused by name, and nothing is left half-done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calumma.model import load
from calumma.model.config import ModelConfig
from calumma.model.convert import ConversionError, export_hugging_face, extend_hugging_face, import_hugging_face
from calumma.model.directory import IMAGE_TOKENIZER, save_model
from calumma.model.transformer import Transformer

pytest.importorskip("transformers")


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def test_missing_and_unknown_names_are_listed(copy: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        del weights["model.layers.1.self_attn.q_norm.bias"]
        del weights["model.norm.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # known, and not needed

    changed(copy, change)
    with pytest.raises(ConversionError) as told:
        import_hugging_face(copy, tmp_path / "ours")
    assert "2 missing: model.layers.1.self_attn.q_norm.bias, model.norm.weight" in str(told.value)
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
        ({"model_type": "llama"}, "model_type 'llama' is a text model: `calumma extend hf`"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ({"num_attention_heads": 3}, "a model that cannot be"),
        ({"vq_config": {"double_latent": True}}, "double_latent True"),
        ({"vq_config": {"num_embeddings": 0}}, "a VQGAN that cannot be"),
    ],
)
def test_other_architectures_are_refused(copy: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    settings = json.loads((copy / "config.json").read_text())
    if "vq_config" in change:
        change = {"vq_config": settings["vq_config"] | change["vq_config"]}
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


def test_a_codebook_of_another_size_is_refused(make_hugging_face: Callable[..., Any], tmp_path: Path) -> None:
    make_hugging_face(tmp_path / "other", num_embeddings=12)
    with pytest.raises(ConversionError, match="16 image codes, the codebook 12"):
        import_hugging_face(tmp_path / "other", tmp_path / "ours")


def test_an_incomplete_model_directory_is_not_exported(case: Any, tmp_path: Path) -> None:
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
    with pytest.raises(ConversionError, match="no Chameleon with query_key_norm False"):
        export_hugging_face(tmp_path / "model", tmp_path / "hf")


# --- all or nothing -------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    pass


def stop(done: float, total: float, name: str) -> None:
    if done > total / 2:
        raise Stopped


def test_an_interrupted_conversion_leaves_nothing(case: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        import_hugging_face(case.hugging_face, tmp_path / "out" / "ours", progress=stop)
    with pytest.raises(Stopped):
        export_hugging_face(case.ours, tmp_path / "out" / "hf", progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(case: Any, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    import_hugging_face(case.hugging_face, tmp_path / "ours")  # an empty folder is as good as none
    load(tmp_path / "ours")
    with pytest.raises(ConversionError, match="exists already"):
        import_hugging_face(case.hugging_face, tmp_path / "ours")
    with pytest.raises(ConversionError, match="exists already"):
        export_hugging_face(case.ours, tmp_path / "ours" / "config.json")


def test_folders_that_hold_something_else_say_what_to_do(copy: Path, tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(ConversionError) as error:
            import_hugging_face(folder, tmp_path / "ours")
        with pytest.raises(ConversionError) as again:
            extend_hugging_face(folder, tmp_path / "ours", tmp_path)
        if folder != copy:
            assert str(again.value) == str(error.value)
        return str(error.value)

    assert "there is no folder" in told(tmp_path / "nowhere")
    adapter, pickled, quantized = (tmp_path / name for name in ("adapter", "pickled", "quantized"))
    for folder, name in ((adapter, "adapter_model.safetensors"), (pickled, "pytorch_model.bin"), (quantized, "m.gguf")):
        folder.mkdir()
        (folder / name).touch()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "holds an adapter (PEFT) and no model: convert org/base" in told(adapter)
    assert "pytorch_model.bin" in told(pickled)
    assert "safe_serialization=True" in told(pickled)
    assert "GGUF (m.gguf)" in told(quantized)
    changed(copy, lambda weights: weights.pop("lm_head.weight"))
    assert "it is a base model without a head" in told(copy)


def test_tied_weights_say_what_to_do(copy: Path, tmp_path: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    with pytest.raises(ConversionError, match=r"tie_word_embeddings true: .* If lm_head.weight is in the weights, set"):
        import_hugging_face(copy, tmp_path / "ours")
