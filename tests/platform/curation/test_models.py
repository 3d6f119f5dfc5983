"""Scorers with a model of others, each with tiny weights in the form that its publisher has them in: YuNet as ONNX,
CLIP as transformers saves it, LAION's heads as PyTorch saves them."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.steps import models
from calumma.platform.specification import SpecificationError


def picture(colour: Any, width: int = 64, height: int = 48) -> PILImage.Image:
    return PILImage.new("RGB", (width, height), colour)


# -- faces


class Bright(torch.nn.Module):
    """YuNet's outputs, of a net for which whatever is white is a face."""

    def __init__(self) -> None:
        super().__init__()
        self.means = torch.nn.ModuleList(torch.nn.Conv2d(3, 1, s, s, bias=False) for s in (8, 16, 32))
        for mean in self.means:
            torch.nn.init.constant_(mean.weight, 1 / mean.weight.numel())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        bright = [torch.sigmoid((mean(x) - 128) / 8).reshape(1, -1, 1) for mean in self.means]
        boxes = [b.expand(-1, -1, 4) * 0 + 0.1 for b in bright]
        marks = [b.expand(-1, -1, 10) * 0 for b in bright]
        return [*bright, *(b * 1.0 for b in bright), *boxes, *marks]


@pytest.fixture(scope="module")
def yunet(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("cv2")
    from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

    names = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in (8, 16, 32)]
    buffer = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        # It only looks for functions of onnxscript, with a package that is not needed otherwise.
        patch.setattr(onnx_proto_utils, "_add_onnxscript_fn", lambda data, _: data)
        torch.onnx.export(
            Bright().eval(), (torch.zeros(1, 3, 64, 64),), buffer, dynamo=False, input_names=["input"],
            output_names=names, dynamic_axes={name: {1: "places"} for name in names} | {"input": {2: "h", 3: "w"}},
        )  # fmt: skip
    file = tmp_path_factory.mktemp("yunet") / "yunet.onnx"
    file.write_bytes(buffer.getvalue())
    return str(file)


def test_a_face_is_found_wherever_it_is(yunet: str) -> None:
    dark = picture("black", 200, 90)
    face = dark.copy()
    face.paste("white", (140, 30, 190, 80))
    nothing, one, small = models.faces(yunet)([dark, face, picture("white", 20, 10)])
    assert nothing == 0
    assert one > 0.9
    assert small > 0.9


def test_what_is_no_yunet_is_said(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(SpecificationError, match=r"a\.onnx: OpenCV reads no YuNet"):
        models.faces(str(tmp_path / "a.onnx"))


# -- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {
        t: n for n, t in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 16,
            "bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 24, "patch_size": 8}, projection_dim=12
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return str(folder)


def test_agreement_is_the_cosine_that_transformers_own_model_gives(clip: str) -> None:
    import transformers

    images = [picture("red"), picture("blue", 30, 90)]
    texts = ["a red picture", "blue"]
    scores = models.agreement(clip)([Document((Image(i, t),)) for i, t in zip(images, texts, strict=True)])

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokens = transformers.CLIPTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors="pt")
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})(
        images, return_tensors="pt"
    )["pixel_values"]
    with torch.inference_mode():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    assert scores == pytest.approx((out.image_embeds * out.text_embeds).sum(1).tolist(), abs=1e-4)


def test_agreement_of_several_pairs_is_the_least_and_without_any_nothing_disagrees(clip: str) -> None:
    score = models.agreement(clip)
    red, blue = Image(picture("red"), "one"), Image(picture("blue"), "two")
    apart = score([Document((red,)), Document((blue,))])
    together, text, worded = score(
        [Document((red, blue)), Document((Text("a"),)), Document((Image(red.data), Text("one")))]
    )
    assert together == pytest.approx(min(apart), abs=1e-5)
    assert text == 1
    assert worded == pytest.approx(apart[0], abs=1e-5)


@pytest.mark.parametrize("kind", ["linear", "layers", "safetensors"])
def test_aesthetics_are_those_of_the_head(clip: str, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    sizes = [12, 1] if kind == "linear" else [12, 8, 4, 1]
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    # LAION's modules: one Linear; or Linear, Dropout, Linear, … under `layers`.
    state = {
        (f"layers.{2 * n}.{name}" if kind != "linear" else name): value.detach()
        for n, layer in enumerate(layers)
        for name, value in layer.state_dict().items()
    }
    head = tmp_path / ("head.safetensors" if kind == "safetensors" else "head.pth")
    if kind == "safetensors":
        save_file(state, head)
    else:
        torch.save(state, head)
    images = [picture("red"), picture("green")]
    scores = models.aesthetics(clip, str(head))(images)
    with torch.inference_mode():
        features = models._Clip.load(clip, None).of_images(images)
        expected = torch.nn.Sequential(*layers)(features)[:, 0]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    assert np.allclose(features.norm(dim=1), 1)


def test_wrong_weights_are_said_before_any_image(clip: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "l14.pth")
    with pytest.raises(SpecificationError, match=r"768 features, and .* gives 12; it was trained with another CLIP"):
        models.aesthetics(clip, str(tmp_path / "l14.pth"))
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(SpecificationError, match="no weights of linear layers"):
        models.aesthetics(clip, str(tmp_path / "x.pth"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecificationError, match="reads no CLIP in it"):
        models.agreement(str(tmp_path / "empty"))


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(SpecificationError, match=r"opencv-python-headless, .* pip install 'calumma\[scorers\]'"):
        models.faces("weights.onnx")
