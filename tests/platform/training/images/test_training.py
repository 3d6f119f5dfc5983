"""The image tokenizer's training: what is learned, published and drawn. How it goes on after an interruption is
test_resume.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig
from calumma.model.document import Document, Image
from calumma.model.images import to_image
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.image_losses import PerceptualLoss
from calumma.platform import storage
from calumma.platform.cluster import runner
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import SpecificationError, validate
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import ImageAssignment
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.images import data, loop, measure, stage
from calumma.platform.training.specification import ImageTokenizerSpecification

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


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A torch.distributed group of this process alone."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Log:
    """Stands for MLflow."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.metrics: list[dict[str, float]] = []
        self.files: list[str] = []
        self.checkpoints: list[tuple[Any, ...]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append(metrics)

    def log_image(self, image: PILImage.Image, path: str) -> None:
        self.files.append(path)

    def log_dict(self, values: dict[str, Any], path: str) -> None:
        self.files.append(path)

    def log_checkpoint(self, *given: Any) -> None:
        self.checkpoints.append(given)

    def log_data(self, *given: Any) -> None: ...

    def back_up(self) -> None: ...

    def close(self) -> None: ...


def train(
    spec: ImageTokenizerSpecification, images: torch.Tensor, folder: Path
) -> tuple[ImageTokenizer, list[dict[str, float]]]:
    """The tokenizer after all steps, and the metrics of those that have a loss."""
    log = Log()
    assignment = ImageAssignment(spec, Run("unused", "0"), str(folder), {}, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_pool", lambda *given: images)
        steps = loop.Loop(assignment, Worker(0, 1, torch.device("cpu")), log)  # type: ignore[arg-type]
        steps.run()
    return steps.training.tokenizer.eval(), [metrics for metrics in log.metrics if "loss" in metrics]


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
def test_every_objective_learns_to_reconstruct(loss: dict[str, Any], tmp_path: Path) -> None:
    images = bars()
    tokenizer, metrics = train(specification(loss=ImageLossConfig(**loss)), images, tmp_path)
    assert metrics[-1]["reconstruction"] < 0.6 * metrics[0]["reconstruction"]
    assert measure.measure_reconstruction(tokenizer, images).used_K.sum() > 3
    judged = [m["step"] for m in metrics if "discriminator_loss" in m]
    assert judged == ([m["step"] for m in metrics if m["step"] > 30] if "adversarial" in loss else [])


def test_moving_averages_move_the_codes_and_no_gradient_does(tmp_path: Path) -> None:
    tokenizer, _ = train(specification(steps=3, loss=ImageLossConfig(codebook="ema")), bars(), tmp_path)
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
    _, metrics = train(spec, bars(), tmp_path)
    assert all(m["perceptual_loss"] > 0 for m in metrics)
    missing = spec.model_copy(update={"loss": ImageLossConfig(perceptual_weights="none.safetensors")})
    with pytest.raises(SpecificationError, match=r"there is no file .*none\.safetensors"):
        train(missing, bars(), tmp_path)
    storage.write_bytes(f"{tmp_path}/lpips.safetensors", b"no weights at all")
    with pytest.raises(SpecificationError, match="perceptual_weights"):
        train(spec, bars(), tmp_path)


def test_the_training_images_that_are_measured_come_from_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of different pictures lie one after the other."""
    monkeypatch.setattr(loop, "_MEASURED_IMAGES", 5)
    monkeypatch.setattr(loop, "_MEASURED_CODES", 0)
    measured: list[torch.Tensor] = []

    def note(tokenizer: ImageTokenizer, images: torch.Tensor, **named: Any) -> measure.ReconstructionErrors:
        measured.append(images)
        return measure.measure_reconstruction(tokenizer, images, **named)

    monkeypatch.setattr(loop, "measure_reconstruction", note)
    images = torch.arange(24, dtype=torch.uint8)[:, None, None, None].expand(24, 3, 16, 16).contiguous()
    train(specification(steps=2, held_out_every=1), images, tmp_path)
    assert measured[0][:, 0, 0, 0].tolist() == [0, 5, 10, 15, 20]


# -- what is published --


def publish_images(uri: str, images: torch.Tensor) -> None:
    content = document_shards.to_parquet([Document((Image(to_image(data.as_floats(pixels))),)) for pixels in images])
    storage.write_bytes(f"{uri}/documents.parquet", content)
    Manifest(kind="curated", files=[FileEntry.from_bytes("documents.parquet", content, rows=len(images))]).write(uri)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Curated documents and an image tokenizer that an earlier run published, with somebody's notes beside it; workers
    are this process."""
    publish_images(f"{tmp_path}/curated", bars())
    publish_images(f"{tmp_path}/held-out", bars(6))
    storage.write_bytes(f"{tmp_path}/made/old.safetensors", b"old")
    Manifest(kind="image_tokenizer", files=[FileEntry.from_bytes("old.safetensors", b"old")]).write(f"{tmp_path}/made")
    (tmp_path / "made/notes.txt").write_text("mine")
    monkeypatch.setattr(stage.capacity, "require_workers", lambda resources: 1)
    monkeypatch.setattr(stage, "fit", lambda loop, config, **named: loop(config))
    monkeypatch.setattr(loop, "set_up_worker", lambda: Worker(0, 1, torch.device("cpu")))
    monkeypatch.setattr(loop, "BackgroundWriter", Log)
    return tmp_path


def run_job(spec: ImageTokenizerSpecification) -> Manifest:
    run = Run("unused", "0")
    return stage.train_image_tokenizer(spec, run, no_progress)


def test_a_failed_training_keeps_the_tokenizer_and_a_finished_one_replaces_its_files_alone(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specification(published, documents=["curated"], held_out=["held-out"], output="made", steps=4)
    before = storage.sizes(str(published))

    def fails(*given: Any, **named: Any) -> Any:
        raise TrainingFailed("no")

    with monkeypatch.context() as failing:
        failing.setattr(stage, "fit", fails)
        with pytest.raises(TrainingFailed):
            run_job(spec)
    assert storage.sizes(str(published)) == before

    manifest = run_job(spec)
    assert {entry.path for entry in manifest.files} == {"config.json", "model.safetensors"}
    assert "files" not in manifest.report
    manifest.verify(f"{published}/made", content=True)
    names = {path.name for path in (published / "made").iterdir()}
    assert names == {"config.json", "model.safetensors", "manifest.json", "notes.txt"}
    expected = {"measured_on": "held_out", "measured_images": 6, "training_images": 24, "steps": 4, "workers": 1}
    assert manifest.report | expected == manifest.report


def test_checkpoints_of_a_finished_training_make_way_for_another_and_those_of_a_stopped_one_do_not(
    published: Path,
) -> None:
    spec = specification(published, documents=["curated"], output="made", steps=4)
    run_job(spec)
    changed = spec.model_copy(update={"learning_rate": 1e-4})
    run_job(changed)
    assert catalog.published_steps(spec.training) == [4]
    found = catalog.newest(spec.training)
    assert found is not None
    assert found.manifest.specification["learning_rate"] == 1e-4
    report = found.manifest.report | {"step": 2}
    found.manifest.model_copy(update={"report": report}).write(catalog.checkpoint_uri(spec.training, 4))
    with pytest.raises(
        SpecificationError, match=r"stopped after step 2 of 4.*other settings \(learning_rate\).*--force"
    ):
        run_job(spec)
    runner.delete_result(spec)
    assert catalog.published_steps(spec.training) == []
    assert not Manifest.find(f"{published}/made")
    run_job(spec)


@pytest.mark.parametrize("output", ["", ".", "curated", "curated/below"])
def test_an_output_that_holds_something_else_is_refused(published: Path, output: str) -> None:
    before = storage.sizes(str(published))
    with pytest.raises(SpecificationError, match="output: "):
        run_job(specification(published, documents=["curated"], output=output))
    assert storage.sizes(str(published)) == before


# -- what is drawn --


def test_weights_decide_which_images_are_drawn(tmp_path: Path) -> None:
    images = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    images[3, 0] = 255  # the one red image
    weights = data.sampling_weights(images, redness)
    assert weights.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    spec = specification(steps=80, sampling_weight=f"{__name__}:redness")
    tokenizer, _ = train(spec, images, tmp_path)
    red, black = (
        measure.measure_reconstruction(tokenizer, images[3:4]),
        measure.measure_reconstruction(tokenizer, images[:1]),
    )
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
def test_sampling_weights_that_cannot_be_are_refused(function: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecificationError, match=message):
        train(specification(sampling_weight=function), bars(), tmp_path)


# -- specifications --


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"decoder": False}}, r"model\.decoder must be true"),
        ({"model": {"resolution": 16}, "loss": {"adversarial": 1.0}}, "images of 24 pixels, model.resolution is 16"),
        ({"model": {"resolution": 8, "multipliers": [1]}, "loss": {"perceptual_weights": "x"}}, "images of 16 pixels"),
        ({"resources": {"workers": {"min": 1, "max": 2}}}, r"batch: 1 images cannot be shared by 2 workers"),
        ({"loss": {"pixels": "l3"}}, r"loss\.pixels: .*'l1' or 'l2'"),
        ({"loss": {"gan": 1}}, r"loss\.gan: unknown field .*adversarial_start"),
    ],
)
def test_specifications_that_cannot_run_are_refused(values: dict[str, Any], message: str) -> None:
    given = {"storage": "s", "documents": ["x"], "steps": 1, "batch": 1} | values
    with pytest.raises(SpecificationError, match=message):
        validate(ImageTokenizerSpecification, given, "here")


def test_a_specification_of_before_still_means_the_same() -> None:
    spec = validate(ImageTokenizerSpecification, {"storage": "s", "documents": ["x"], "steps": 1, "batch": 1}, "here")
    assert spec.loss == ImageLossConfig()
    assert (spec.loss.pixels, spec.loss.codebook, spec.loss.adversarial) == ("l2", "gradient", 0.0)
    assert spec.sampling_weight is None
