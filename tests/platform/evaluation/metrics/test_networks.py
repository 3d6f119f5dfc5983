"""FID and CLIP score by the networks that are used for them, with random weights in files, as torchmetrics has them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from calumma.model.document import Document, Image
from calumma.platform.evaluation.benchmarks import drawing
from calumma.platform.evaluation.benchmarks.items import Item
from calumma.platform.evaluation.metrics import pictures
from calumma.platform.evaluation.metrics.inception import Inception
from calumma.platform.evaluation.systems.prompts import Answer, Sampling
from calumma.platform.specification import SpecificationError

SOME = 128  # features: torchmetrics needs a minute for the root of all 2,048


def drawings(seed: int, count: int = 4) -> list[PILImage.Image]:
    random = np.random.default_rng(seed)
    rough = random.integers(0, 255, (count, 6, 8, 3), np.uint8)
    return [PILImage.fromarray(each).resize((64, 48), PILImage.Resampling.BICUBIC) for each in rough]


def tensor(images: list[PILImage.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def inception() -> Inception:
    """With weights that a seed gives, those of which `values/inception.json` has torch-fidelity 0.4's features."""
    network, random = Inception(), torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, value in sorted(network.state_dict().items()):
        drawn = torch.randn(value.shape, generator=random) if value.is_floating_point() else value
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        elif name.endswith("conv.weight"):
            drawn = drawn * (2 / value[0].numel()) ** 0.5
        elif name.endswith("bn.weight"):
            drawn = 1 + 0.1 * drawn
        elif value.is_floating_point():
            drawn = 0.1 * drawn
        state[name] = drawn
    network.load_state_dict(state)
    return network.eval()


def test_features_are_torch_fidelitys_inceptions(inception: Inception) -> None:
    """Its own implementation, run once on the same weights and pictures, smaller and larger than the network's."""
    known = json.loads((Path(__file__).parent / "values" / "inception.json").read_text())
    random = np.random.default_rng(0)
    small = torch.from_numpy(random.integers(0, 255, (2, 3, 48, 64), np.uint8))
    large = torch.from_numpy(random.integers(0, 255, (1, 3, 500, 320), np.uint8))
    with torch.inference_mode():
        assert inception(small)[:, ::128].tolist() == [pytest.approx(row, abs=1e-5) for row in known["features"]]
        assert inception(large)[0, ::128].tolist() == pytest.approx(known["large"], abs=1e-5)


def test_fid_is_torchmetrics_by_the_same_network(inception: Inception, tmp_path: Path) -> None:
    metrics = pytest.importorskip("torchmetrics.image.fid")
    torch.save(inception.state_dict(), tmp_path / "inception.pth")
    real, drawn = drawings(0), drawings(1)
    items = [
        Item(str(n), Document(()), Sampling(mode="image"), ["", png(picture)], "") for n, picture in enumerate(real)
    ]
    answers = [[Answer(Document((Image(picture),)))] for picture in drawn]
    found = drawing.grade_drawing(items, answers, {"inception": str(tmp_path / "inception.pth")})

    class Theirs(torch.nn.Module):
        num_features = SOME

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return inception(images)[:, :SOME]  # type: ignore[no-any-return]

    metric = metrics.FrechetInceptionDistance(feature=Theirs(), input_img_size=(3, 48, 64))
    metric.set_dtype(torch.float64)
    metric.update(tensor(real), real=True)
    metric.update(tensor(drawn), real=False)
    features = drawing.inception_features(str(tmp_path / "inception.pth"))
    some = pictures.frechet(features(real)[:, :SOME], features(drawn)[:, :SOME])
    assert some == pytest.approx(float(metric.compute()), rel=1e-4)
    assert found.metrics["fid"] == pytest.approx(pictures.frechet(features(real), features(drawn)), rel=1e-6)
    assert found.metrics["fid"] > some > 0


def png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [{"code": print}, {"fc.bias": torch.zeros(3)}, [1]])
def test_a_file_of_something_else_or_that_would_run_code_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "inception.pth")
    with pytest.raises(SpecificationError, match="no weights of FID's Inception"):
        drawing.inception_features(str(tmp_path / "inception.pth"))


def test_the_frechet_distance_of_few_pictures_and_many_features_is_that_of_their_covariances() -> None:
    from scipy.linalg import sqrtm

    random = np.random.default_rng(0)
    for count, width in ((40, 12), (5, 12)):
        one, other = random.normal(size=(count, width)), random.normal(0.3, 2, size=(count + 3, width))
        a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
        difference = one.mean(0) - other.mean(0)
        expected = difference @ difference + np.trace(a + b) - 2 * np.trace(sqrtm(a @ b)).real
        assert pictures.frechet(one, other) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CLIP as transformers keeps it, of a small size."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    size: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5
    )
    text = dict(
        **size, vocab_size=len(tokens), max_position_embeddings=77,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    vision = dict(**size, image_size=32, patch_size=8)
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_clip_score_is_torchmetrics(clip: Path) -> None:
    scores = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    transformers = pytest.importorskip("transformers")
    drawn = drawings(2, 3)
    captions = ["a red square", "two green circles on blue", "an owl"]
    items = [
        Item(str(n), Document(()), Sampling(mode="image"), [caption, b""], caption)
        for n, caption in enumerate(captions)
    ]
    answers = [[Answer(Document((Image(picture),)))] for picture in drawn]
    found = drawing.grade_drawing(items, answers, {"clip": str(clip)})

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip)
    words = transformers.CLIPTokenizer.from_pretrained(clip)

    def processor(text: Any = None, images: Any = None, **options: Any) -> Any:
        return words(text, **options) if images is None else pixels(images, return_tensors="pt")

    class Features:
        """torchmetrics 1.9 asks for tensors, which transformers 5 gives within an output."""

        config = model.config

        def get_image_features(self, values: torch.Tensor) -> torch.Tensor:
            return getattr(model.get_image_features(values), "pooler_output", None)  # type: ignore[no-any-return]

        def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return getattr(model.get_text_features(ids, mask), "pooler_output", None)  # type: ignore[no-any-return]

        def to(self, device: Any) -> Any:
            return self

    with torch.inference_mode():
        theirs, _ = scores._clip_score_update([*tensor(drawn)], captions, Features(), processor)
    expected = [max(0.0, float(score) / 100) for score in theirs]
    assert found.values["clip_score"] == pytest.approx(expected, abs=1e-4)
    assert max(expected) > 0.05
