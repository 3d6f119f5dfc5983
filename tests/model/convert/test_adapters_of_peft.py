"""Adapters that PEFT has trained on transformers' Chameleon, which has queries and keys in another order."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from calumma.model.adapters.files import WEIGHTS, read_adapter, write_adapter
from calumma.model.adapters.names import of_hugging_face, to_hugging_face
from calumma.model.convert.hugging_face import config_of, open_source, to_ours
from calumma.model.transformer import Transformer


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_transformers_chameleon_comes_over_and_goes_back(dora: bool, plain: Path, tmp_path: Path) -> None:
    """Trained by PEFT on the Hugging Face model: queries and keys stand in another order there."""
    theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(plain).eval()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    asked = peft.LoraConfig(r=4, target_modules=targets, use_dora=dora, init_lora_weights=False)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(theirs, asked, autocast_adapter_dtype=False).eval()  # type: ignore[arg-type]
    tuned.save_pretrained(str(tmp_path / "peft"))
    config = config_of(json.loads((plain / "config.json").read_text()), "config.json")
    weights = {n: e for n, e in open_source(plain).items() if not n.startswith("model.vqmodel")}
    ours = Transformer(config)
    found = read_adapter(tmp_path / "peft", config)
    ours.load_state_dict(
        found.merged({name: entry.read().float() for name, entry in to_ours(weights, config, "").items()})
    )
    tokens = torch.randint(20, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = tuned(input_ids=tokens).logits.float()
    logits = ours.eval()(tokens)
    seen = expected > torch.finfo(torch.bfloat16).min  # image ids, which theirs masks
    torch.testing.assert_close(logits[seen], expected[seen], rtol=0, atol=1e-4)
    again = of_hugging_face(to_hugging_face(found, config), config)
    for name, layer in again.layers.items():
        assert torch.equal(layer.up_OR, found.layers[name].up_OR)
    write_adapter(tmp_path / "exported", to_hugging_face(found, config))
    exported, original = (load_file(tmp_path / folder / WEIGHTS) for folder in ("exported", "peft"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
