"""Options of the image tokenizer's training: sampling weights, discriminator, perceptual loss, moving averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig
from calumma.model.image_losses import PerceptualLoss
from calumma.model.image_tokenizer import ImageTokenizer
from calumma.platform import config, storage
from calumma.platform.config import ImageTokenizerSpecification, SpecificationError
from calumma.platform.data.manifest import FileEntry, Manifest
from calumma.platform.progress import silent
from calumma.platform.tracking import Run
from calumma.platform.training import image_tokenizer
from calumma.platform.training.workers import TrainingFailed, Worker

SHAPE = ImageTokenizerConfig(
    resolution=16, codebook_size=16, embedding=4, base_channels=8, multipliers=[1, 2], residual_blocks=1
)
SMALL_CRITIC = {"discriminator_channels": 4, "discriminator_layers": 2}


def specification(root: Path | str = "/nowhere", **values: Any) -> ImageTokenizerSpecification:
    given = {"storage": str(root), "documents": ["x"], "steps": 60, "batch": 8, "model": SHAPE, "learning_rate": 3e-3}
    return ImageTokenizerSpecification(**(given | values))


def bars(count: int = 24) -> torch.Tensor:
    """ByteTensor [N, 3, 16, 16]: bright bars at different places."""
    images = torch.zeros(count, 3, 16, 16, dtype=torch.uint8)
    for i in range(count):
        images[i, i % 3, :, i % 13 : i % 13 + 3] = 255
    return images


class Log:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append(metrics)

    def close(self) -> None:
        pass


def train(spec: ImageTokenizerSpecification, images: torch.Tensor) -> tuple[ImageTokenizer, list[dict[str, float]]]:
    torch.manual_seed(0)
    tokenizer, log = ImageTokenizer(spec.model), Log()
    image_tokenizer._steps(spec, Worker(0, 1, torch.device("cpu")), tokenizer, images, log)  # type: ignore[arg-type]
    return tokenizer.eval(), log.metrics


def redness(image: PILImage.Image) -> float:
    return float(image.getpixel((0, 0))[0] > 200)  # type: ignore[index]


def nothing(image: PILImage.Image) -> float:
    return 0.0


def below(image: PILImage.Image) -> float:
    return -1.0


# -- what is learned --


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"pixels": "l1"},
        {"codebook": "ema", "ema_decay": 0.9},
        {"adversarial": 0.1, "adversarial_start": 30, **SMALL_CRITIC},
    ],
    ids=["plain", "l1", "ema", "adversarial"],
)
def test_every_objective_learns_to_reconstruct(loss: dict[str, Any]) -> None:
    images = bars()
    tokenizer, metrics = train(specification(loss=ImageLossConfig(**loss)), images)
    assert metrics[-1]["reconstruction"] < 0.6 * metrics[0]["reconstruction"]
    assert image_tokenizer.measure(tokenizer, images).used_K.sum() > 3
    judged = [m["step"] for m in metrics if "discriminator_loss" in m]
    assert judged == ([m["step"] for m in metrics if m["step"] > 30] if "adversarial" in loss else [])


def test_moving_averages_move_the_codes_and_no_gradient_does() -> None:
    tokenizer, _ = train(specification(steps=3, loss=ImageLossConfig(codebook="ema")), bars())
    assert tokenizer.codebook.weight.grad is None
    torch.manual_seed(0)
    assert not torch.equal(tokenizer.codebook.weight, ImageTokenizer(SHAPE).codebook.weight)


def test_perceptual_weights_are_read_from_storage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = PerceptualLoss((2, 2, 2, 2, 2)).state_dict()
    weights = {
        f"lin{name.partition('.')[2]}.model.1.weight" if name.startswith("calibration") else name: value.contiguous()
        for name, value in ours.items()
    }
    save_file(weights, str(tmp_path / "lpips.safetensors"))
    spec = specification(tmp_path, steps=2, loss=ImageLossConfig(perceptual_weights="lpips.safetensors"))
    _, metrics = train(spec, bars())
    assert all(m["perceptual_loss"] > 0 for m in metrics)
    missing = spec.model_copy(update={"loss": ImageLossConfig(perceptual_weights="none.safetensors")})
    with pytest.raises(SpecificationError, match=r"there is no file .*none\.safetensors"):
        train(missing, bars())
    storage.write_bytes(f"{tmp_path}/lpips.safetensors", b"no weights at all")
    with pytest.raises(SpecificationError, match="perceptual_weights"):
        train(spec, bars())


# -- what is published --


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Curated documents and an image tokenizer that an earlier run published, with somebody's notes beside it."""
    Manifest(kind="curated").write(str(tmp_path / "curated"))
    storage.write_bytes(f"{tmp_path}/made/old.safetensors", b"old")
    Manifest(kind="image_tokenizer", files=[FileEntry.of("old.safetensors", b"old")]).write(f"{tmp_path}/made")
    (tmp_path / "made/notes.txt").write_text("mine")
    monkeypatch.setattr(image_tokenizer.cluster, "require", lambda resources: 1)
    return tmp_path


def run_job(spec: ImageTokenizerSpecification) -> Manifest:
    run = Run("unused", "0")
    return image_tokenizer.train_image_tokenizer(spec, run, silent)


def test_a_failed_training_keeps_the_tokenizer_and_a_finished_one_replaces_its_files_alone(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specification(published, documents=["curated"], output="made")
    before = storage.sizes(str(published))

    def fails(*given: Any, **named: Any) -> Any:
        raise TrainingFailed("no")

    monkeypatch.setattr(image_tokenizer.workers, "fit", fails)
    with pytest.raises(TrainingFailed):
        run_job(spec)
    assert storage.sizes(str(published)) == before

    monkeypatch.setattr(image_tokenizer.workers, "fit", lambda loop, config, **named: loop(config))
    monkeypatch.setattr(image_tokenizer.workers, "join", lambda: Worker(0, 1, torch.device("cpu")))
    monkeypatch.setattr(image_tokenizer, "_read", lambda *given: bars())
    monkeypatch.setattr(image_tokenizer, "_steps", lambda *given: None)
    monkeypatch.setattr(image_tokenizer, "_report", lambda *given: {})
    monkeypatch.setattr(image_tokenizer, "BackgroundWriter", lambda run: Log())
    manifest = run_job(spec)
    assert {entry.path for entry in manifest.files} == {"config.json", "model.safetensors"}
    assert "files" not in manifest.report
    manifest.verify(f"{published}/made", content=True)
    names = {path.name for path in (published / "made").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "notes.txt"}


@pytest.mark.parametrize("output", ["", ".", "curated", "curated/below"])
def test_an_output_that_holds_something_else_is_refused(published: Path, output: str) -> None:
    before = storage.sizes(str(published))
    with pytest.raises(SpecificationError, match="output: "):
        run_job(specification(published, documents=["curated"], output=output))
    assert storage.sizes(str(published)) == before


# -- what is drawn --


def test_weights_decide_which_images_are_drawn() -> None:
    images = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    images[3, 0] = 255  # the one red image
    weights = image_tokenizer.sampling_weights(images, redness)
    assert weights.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    spec = specification(steps=80, sampling_weight=f"{__name__}:redness")
    tokenizer, _ = train(spec, images)
    red, black = image_tokenizer.measure(tokenizer, images[3:4]), image_tokenizer.measure(tokenizer, images[:1])
    assert red.squared < 0.05 < black.squared  # it has seen nothing but red


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (f"{__name__}:nothing", "every image got the weight 0"),
        (f"{__name__}:below", r"image 0 got the weight -1\.0"),
        (f"{__name__}:absent", f"sampling_weight: there is no '{__name__}:absent' on this machine"),
        ("no.such.module:f", "sampling_weight: there is no 'no.such.module:f' on this machine: No module named"),
        ("math", "sampling_weight: 'math' must look like package.module:function"),
        ("math:pi", "sampling_weight: 'math:pi' is no function but float"),
    ],
)
def test_sampling_weights_that_cannot_be_are_refused(function: str, message: str) -> None:
    with pytest.raises(SpecificationError, match=message):
        train(specification(sampling_weight=function), bars())


# -- specifications --


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"decoder": False}}, r"model\.decoder must be true"),
        ({"model": {"resolution": 16}, "loss": {"adversarial": 1.0}}, "images of 24 pixels, model.resolution is 16"),
        ({"model": {"resolution": 8, "multipliers": [1]}, "loss": {"perceptual_weights": "x"}}, "images of 16 pixels"),
        ({"loss": {"pixels": "l3"}}, r"loss\.pixels: .*'l1' or 'l2'"),
        ({"loss": {"gan": 1}}, r"loss\.gan: unknown field .*adversarial_start"),
    ],
)
def test_specifications_that_cannot_run_are_refused(values: dict[str, Any], message: str) -> None:
    given = {"storage": "s", "documents": ["x"], "steps": 1, "batch": 1} | values
    with pytest.raises(SpecificationError, match=message):
        config.validate(ImageTokenizerSpecification, given, "here")


def test_a_specification_of_before_still_means_the_same() -> None:
    spec = config.validate(
        ImageTokenizerSpecification, {"storage": "s", "documents": ["x"], "steps": 1, "batch": 1}, "here"
    )
    assert spec.loss == ImageLossConfig()
    assert (spec.loss.pixels, spec.loss.codebook, spec.loss.adversarial) == ("l2", "gradient", 0.0)
    assert spec.sampling_weight is None
