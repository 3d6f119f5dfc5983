"""Training: the same step on any number of workers, checkpoints that survive a killed upload, and a whole stage."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image as PILImage
from pydantic import ValidationError

from calumma.model import load
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.document import Document, Image, Text
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.transformer import Transformer
from calumma.platform import storage
from calumma.platform.cluster import connection, runner
from calumma.platform.cluster.progress import silent
from calumma.platform.shards import documents as document_shards
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches
from calumma.platform.specification import Resources, SpecificationError, Tracking
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing import text_tokenizer
from calumma.platform.tokenizing.specification import TextTokenizerSpecification, TokenizeSpecification
from calumma.platform.tracking import registry
from calumma.platform.tracking.fingerprints import fingerprints, finished
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training import ablation, samples
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.errors import Stopped
from calumma.platform.training.group import watchdog
from calumma.platform.training.images import data, measure
from calumma.platform.training.images.stage import train_image_tokenizer
from calumma.platform.training.preparation import prepare
from calumma.platform.training.specification import (
    AblateSpecification,
    FinetuneSpecification,
    ImageTokenizerSpecification,
    PretrainSpecification,
    TrainSpecification,
)
from calumma.platform.training.stage import run_stage
from calumma.platform.training.steps import engine, held_out
from calumma.platform.training.steps.held_out import HeldOutBatch

MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=64, dropout=0.1)
CODES = 16


# -- documents, tokenizers and token shards of a small corpus --


def picture(seed: int, size: int = 8) -> PILImage.Image:
    """A bright square on a dark ground: something that can be learned."""
    random = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), 20, np.uint8)
    x, y = random.integers(0, size // 2, 2)
    pixels[y : y + size // 2, x : x + size // 2] = random.integers(100, 255, 3)
    return PILImage.fromarray(pixels)


def publish_documents(uri: str, documents: list[Document]) -> None:
    data = document_shards.to_parquet(documents)
    storage.write_bytes(storage.join(uri, "documents.parquet"), data)
    Manifest(kind="curated", files=[FileEntry.of("documents.parquet", data, rows=len(documents))]).write(uri)


def publish_tokens(root: str, name: str) -> None:
    from calumma.platform.tokenizing.tokenizer import Tokenizer

    spec = TokenizeSpecification(storage=root, documents=[f"curated/{name}"], context=MODEL.context, micro_batch=2)
    output = storage.join(root, "tokens", name)
    made = Tokenizer(spec.model_dump(mode="json"))(
        {
            "shards": document_shards.shards(f"{root}/curated/{name}"),
            "seed": 0,
            "output": output,
            "stem": "tokens",
            "receipt": storage.join(root, "receipt.json"),
        },
    )
    files = [FileEntry.model_validate(entry) for entry in made["files"]]
    Manifest(kind="tokens", files=files, specification=spec.model_dump(mode="json")).write(output)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage with curated documents, tokenizers and token shards: pictures with captions, lines of text."""
    root = str(tmp_path_factory.mktemp("storage"))
    words = ["one", "two", "three", "four"]
    pairs = [Document((Text(words[i % 4] + " "), Image(picture(i)))) for i in range(24)]
    lines = [Document((Text(f"{words[i % 4]} follows {words[(i + 3) % 4]}. " * 3),)) for i in range(24)]
    publish_documents(f"{root}/curated/pairs", pairs)
    publish_documents(f"{root}/curated/lines", lines)
    spec = TextTokenizerSpecification(
        storage=root, documents=["curated/pairs", "curated/lines"], vocabulary_size=320, image_codes=CODES
    )
    with recorded(spec, f"{root}/mlflow") as run:
        text_tokenizer.train_text_tokenizer(spec, run, silent)
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(f"{root}/tokenizers/image")
    for name in ("pairs", "lines"):
        publish_tokens(root, name)
    return root


@contextmanager
def recorded(spec: Any, folder: str) -> Iterator[Run]:
    with job_run(spec.model_copy(update={"tracking": Tracking(uri=folder)})) as run:
        yield run


def stage(root: str, **fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "tracking": {"uri": f"{root}/mlflow"},
        "resources": {"workers": 2, "cpus_per_worker": 1},
        "mixture": {"tokens/pairs": 0.5, "tokens/lines": 0.5},
        "held_out": {"lines": "tokens/lines"},
        "output": "stages/one",
        "model": MODEL.model_dump(exclude={"vocabulary_size"}),
        "steps": 12,
        "micro_batches": 3,
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": 2, "final": 0.1},
        "precision": "float32",
        "checkpoint_every": 8,
        "log_every": 2,
        "samples": ["one two"],
    }
    return PretrainSpecification.model_validate(values | fields)


# -- one step is the same on any number of workers --


def rows(step: int, number: int) -> HeldOutBatch:
    """Micro-batches with very different numbers of trained tokens: averaging averages would show."""
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(0, 50, (2, 17), generator=generator)
    return HeldOutBatch(tokens, torch.rand(2, 17, generator=generator) < 0.1 + 0.4 * number, torch.zeros_like(tokens))


def take_steps(rank: int, world: int, zero_stage: int, recompute: bool, folder: str) -> None:
    """A worker that takes three steps of three micro-batches; the first writes weights, losses and gradient norms."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world
    )
    config = MODEL.model_copy(update={"vocabulary_size": 50})
    spec = stage("/nowhere", zero_stage=zero_stage, optimizer={"learning_rate": 0.01, "eps": 1e-3})
    transformer = Transformer(config).initialize(0).checkpoint_activations(recompute)
    run = engine.initialize(transformer, spec, world)
    image_mask_V = torch.arange(50) >= 40
    empty = HeldOutBatch(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
    seen = []
    for step in range(3):
        group = [rows(step, number) for number in range(rank, 3, world)]
        group += [empty] * (engine.micro_batches_a_worker(spec, world) - len(group))
        counts = engine.count(group, image_mask_V, run.device)
        local, stability = engine.step(
            run, group, counts, image_mask_V, 1e-3, world, (0, step, rank), measure=rank == 0 and step == 1
        )
        assert bool(stability) == (rank == 0 and step == 1)
        sums = engine.everywhere(local)
        seen.append([*sums.tolist(), *counts, float(run.get_global_grad_norm())])
    weights = engine.gathered_weights(run, keep=rank == 0)
    if rank == 0:
        torch.save({"weights": weights, "seen": seen}, f"{folder}/{world}.pt")


@pytest.mark.parametrize(("zero_stage", "recompute"), [(1, False), (3, False), (3, True)])
def test_one_and_two_workers_take_the_same_steps(tmp_path: Path, zero_stage: int, recompute: bool) -> None:
    """Three micro-batches: two workers need an empty one. Dropout is on: it too follows the micro-batch. Stability is
    measured by one of them, and activations are recomputed or kept: neither changes a step."""
    for world in (1, 2):
        torch.multiprocessing.spawn(take_steps, (world, zero_stage, recompute, str(tmp_path)), nprocs=world)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert two["seen"] == [pytest.approx(values, rel=1e-4) for values in one["seen"]]
    initial = Transformer(MODEL.model_copy(update={"vocabulary_size": 50})).initialize(0).state_dict()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=2e-5)
        assert not torch.equal(weight, initial[name])


class Counted:
    """A stand-in for a DeepSpeed engine in evaluation: a plain module with a device."""

    device = torch.device("cpu")

    def __init__(self, module: Transformer) -> None:
        self.module = module

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


def test_the_held_out_loss_is_the_mean_over_all_trained_tokens(root: str) -> None:
    size = json.loads(Path(root, "tokenizers/text/vocabulary.json").read_text())["size"]
    transformer = Transformer(MODEL.model_copy(update={"vocabulary_size": size, "dropout": 0.5})).initialize(0)
    image_mask_V = torch.zeros(size, dtype=torch.bool)
    found = held_out.measure(Counted(transformer), f"{root}/tokens/pairs", image_mask_V, 0, 1)
    total, number = 0.0, 0
    transformer.eval()
    uri = f"{root}/tokens/pairs"
    for micro_batch in all_micro_batches(uri, Manifest.read(uri)):
        batch = held_out.read(RowGroupReader(), micro_batch)
        with torch.no_grad():
            logits = transformer(batch.tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        total += float(losses[batch.mask[:, 1:]].sum())
        number += int(batch.mask[:, 1:].sum())
    assert found["loss"] == pytest.approx(total / number, rel=1e-5)
    assert "loss_image" not in found  # nothing was an image by that mask


def test_settings_become_deepspeeds_and_raw_ones_have_the_last_word() -> None:
    spec = stage("/x", deepspeed={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    made = engine.settings(spec, world=2, parameters=1000)
    assert made["gradient_accumulation_steps"] == 2  # three micro-batches on two workers
    assert made["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu"},
    }
    assert made["gradient_clipping"] == spec.optimizer.gradient_clip


def test_norms_do_not_decay_and_every_weight_is_in_one_group() -> None:
    transformer = Transformer(MODEL.model_copy(update={"vocabulary_size": 50}))
    decayed, kept = engine.parameter_groups(transformer, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in transformer.named_parameters()}
    assert sorted(names[id(p)] for group in (decayed, kept) for p in group["params"]) == sorted(names.values())
    assert all("norm" in names[id(p)] for p in kept["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])


# -- what is checked before anything starts --


@pytest.fixture
def run(root: str) -> Iterator[Run]:
    with recorded(stage(root), f"{root}/mlflow") as current:
        yield current


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixture": {"tokens/none": 1.0}}, r"mixture: no token shards .*tokens/none; run the job tokenize"),
        ({"held_out": {"x": "tokens/none"}}, r"held_out: no token shards"),
        ({"mixture": {"curated/lines": 1.0}}, r"mixture: .*'curated' without token shards"),
        ({"text_tokenizer": "none"}, r"text_tokenizer: .*run the job train_text_tokenizer"),
        ({"image_tokenizer": "none"}, r"image_tokenizer: .*run the job train_image_tokenizer"),
        ({"model": MODEL.model_copy(update={"vocabulary_size": 99}).model_dump()}, r"has 99 ids, the vocabulary"),
        ({"model": None, "initial": "stages/none"}, r"initial: .*neither a finished stage nor a model directory"),
        ({"samples": ["one " * 200]}, r"samples: the prompt 'one one .* tokens, the model's context is 64"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_the_terms_of_the_specification(
    root: str, run: Run, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecificationError, match=said):
        prepare(stage(root, **fields), run)


# -- checkpoints --


def leave_checkpoint(spec: TrainSpecification, step: int, inputs: dict[str, str]) -> None:
    report = {"step": step, "schedule_step": step, "tokens": {"text": 0.0, "image": 0.0}}
    Manifest(kind="checkpoint", specification=spec.model_dump(mode="json"), report=report, inputs=inputs).write(
        catalog.location(spec.locate(spec.output), step)
    )


def test_a_stage_goes_on_from_its_newest_whole_checkpoint(root: str, run: Run, tmp_path: Path) -> None:
    spec = stage(root, output=str(tmp_path / "stage"))
    inputs = prepare(spec, run).inputs
    for step in (2, 4):
        leave_checkpoint(spec, step, inputs)
    storage.write_bytes(f"{catalog.location(spec.output, 6)}/state/part", b"killed before its manifest")
    again = spec.model_copy(update={"log_every": 1, "samples": []})
    assert prepare(again, run).first_step == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seed": 1}, r"other settings \(seed\)"),
        ({"micro_batches": 4, "z_loss": 0.0}, r"other settings \(micro_batches, z_loss\)"),
        ({"steps": 13}, r"`steps` was 12 and is 13, and without schedule\.total_steps .*another training"),
        ({"mixture": {"tokens/pairs": 1.0}}, r"other settings \(mixture\)"),
    ],
)
def test_the_checkpoints_of_another_training_are_refused_and_kept(
    root: str, run: Run, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    spec = stage(root, output=str(tmp_path / "stage"))
    leave_checkpoint(spec, 4, prepare(spec, run).inputs)
    other = spec.model_copy(update=change)
    with pytest.raises(SpecificationError, match=rf"stage/checkpoints .* step 4.*{why}.* `output`.* --force"):
        prepare(other, run)
    found = catalog.newest(spec.output)
    assert found is not None
    assert found.step == 4
    runner.discard(other)  # what --force does
    assert prepare(other, run).first_step == 0


def test_the_checkpoints_of_a_longer_training_are_refused_and_kept(root: str, run: Run, tmp_path: Path) -> None:
    schedule = {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}
    spec = stage(root, output=str(tmp_path / "stage"), schedule=schedule)
    leave_checkpoint(spec, 12, prepare(spec, run).inputs)
    with pytest.raises(SpecificationError, match="it is to end after step 8"):
        prepare(spec.model_copy(update={"steps": 8}), run)


def test_other_data_under_the_same_name_is_another_training(root: str, run: Run, tmp_path: Path) -> None:
    spec = stage(root, output=str(tmp_path / "stage"))
    inputs = prepare(spec, run).inputs
    leave_checkpoint(spec, 4, inputs | {f"{root}/tokens/pairs": "another fingerprint"})
    with pytest.raises(SpecificationError, match=r"other data or tokenizers \([^,]*tokens/pairs\)"):
        prepare(spec, run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": MODEL.model_copy(update={"context": 32})}, "the model's context is 32"),
        ({"mixture": {"tokens/pairs": 0.0}}, "a mixture weight must be above 0"),
        ({"initial": "initial", "continue_schedule": True}, "continue_schedule: .* has no checkpoint"),
    ],
)
def test_a_stage_that_is_refused_leaves_the_output_as_it_was(
    root: str, run: Run, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    storage.write_bytes(f"{root}/initial/config.json", MODEL.model_dump_json().encode())
    spec = stage(root, output=str(tmp_path / "stage"), resources={"workers": 1}).model_copy(update=change)
    storage.write_bytes(f"{spec.output}/checkpoints/step-00000004/state/part", b"killed before its manifest")
    Manifest(kind="stage").write(spec.output)
    before = storage.sizes(spec.output)
    with pytest.raises(SpecificationError, match=said):
        run_stage(spec, run, silent)
    assert storage.sizes(spec.output) == before


# -- token shards and their tokenizers --


def record_tokenizers(uri: str, inputs: dict[str, str], **fields: Any) -> None:
    """Let the token shards' manifest say what they were made with, as the job tokenize does."""
    manifest = Manifest.read(uri)
    spec = TokenizeSpecification.model_validate(manifest.specification | fields)
    specification = spec.model_dump(mode="json")
    manifest.model_copy(update={"inputs": inputs, "specification": specification}).write(uri)


@pytest.fixture
def shards_of_its_own(root: str, tmp_path: Path) -> str:
    shutil.copytree(f"{root}/tokens/pairs", tmp_path / "pairs")
    return str(tmp_path / "pairs")


def test_token_shards_of_another_tokenizer_are_refused(root: str, run: Run, shards_of_its_own: str) -> None:
    text = f"{root}/tokenizers/text"
    made_with = fingerprints([text])
    spec = stage(root, mixture={shards_of_its_own: 1.0}, output="stages/none")
    record_tokenizers(shards_of_its_own, made_with)
    prepare(spec, run)
    record_tokenizers(shards_of_its_own, {text: "another fingerprint"})
    with pytest.raises(
        SpecificationError, match=r"pairs were tokenized with another text tokenizer .*run the job tokenize again"
    ):
        prepare(spec, run)
    with pytest.raises(SpecificationError, match=r"held_out: .*another text tokenizer"):
        prepare(stage(root, held_out={"pairs": shards_of_its_own}, output="stages/none"), run)


def test_token_shards_and_tokenizers_may_have_moved_since(root: str, run: Run, shards_of_its_own: str) -> None:
    """The tokenizer is known by its fingerprint; where it was then, the specification of then says."""
    spec = stage(root, mixture={shards_of_its_own: 1.0}, output="stages/none")
    (mark,) = fingerprints([f"{root}/tokenizers/text"]).values()
    record_tokenizers(shards_of_its_own, {"old/tokenizers/text": mark}, storage="old")
    prepare(spec, run)
    record_tokenizers(shards_of_its_own, {"old/tokenizers/text": "another"}, storage="old")
    with pytest.raises(SpecificationError, match="another text tokenizer"):
        prepare(spec, run)
    record_tokenizers(shards_of_its_own, {})  # nothing recorded, nothing to compare
    prepare(spec, run)


def test_a_stage_can_be_lengthened_when_its_schedule_is_longer_than_it(root: str, run: Run, tmp_path: Path) -> None:
    schedule = {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}
    spec = stage(root, output=str(tmp_path / "stage"), schedule=schedule)
    leave_checkpoint(spec, 12, prepare(spec, run).inputs)
    assert prepare(spec.model_copy(update={"steps": 20}), run).first_step == 12


# -- a whole stage on a cluster --


def model_weights(uri: str) -> dict[str, torch.Tensor]:
    return load(Path(uri)).transformer.state_dict()


@pytest.mark.cluster
def test_a_stage_trains_publishes_resumes_and_is_continued(
    ray_cluster: None, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = stage(root, register_as="tiny", alias="champion")
    progress: list[tuple[float, float]] = []
    with job_run(spec) as run:
        manifest = run_stage(spec, run, lambda done, total, note="": progress.append((done, total)))

    # Losses fall, and everything is in MLflow.
    losses = [m.value for m in run.client.get_metric_history(run.id, "loss")]
    steps = [m.step for m in run.client.get_metric_history(run.id, "loss")]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    assert losses[-1] < losses[0] - 0.5
    names = {"loss", "loss_text", "loss_image", "learning_rate", "gradient_norm", "tokens_per_second", "z"}
    latest = run.latest()
    assert names | {"held_out/lines/loss", "stability/layer_01/query_norm", "stability/log_z"} <= set(latest)
    assert all(np.isfinite(value) for value in latest.values())
    assert latest["tokens_per_second"] > 0
    artifacts = [a.path for folder in ("samples", "checkpoints") for a in run.client.list_artifacts(run.id, folder)]
    assert artifacts == ["samples/00.png", "checkpoints/step-00000008.json", "checkpoints/step-00000012.json"]
    assert progress[0] == (0, 12)

    # The manifest, the model directory and the registry agree.
    assert finished(f"{root}/stages/one", spec) == manifest
    manifest.verify(f"{root}/stages/one", content=True)
    report = manifest.report
    assert (report["steps"], report["workers"], report["model_uri"]) == (12, 2, "models:/tiny@champion")
    assert report["held_out"]["lines"]["loss"] == pytest.approx(latest["held_out/lines/loss"])
    assert report["tokens"]["text"] > 0
    assert report["tokens"]["image"] > 0
    with registry.resolve_model(report["model_uri"], spec.tracking) as path:
        assert path.parent == Path(root, "stages/one/registered")  # where no later training writes
        answer = load(path).transformer(torch.tensor([[0, 5, 6]]))
    assert answer.shape[:2] == (1, 3)

    # Killed while it uploaded its last checkpoint: the run before it is repeated to the same weights.
    straight = model_weights(f"{root}/stages/one/model")
    Path(catalog.location(f"{root}/stages/one", 12), "manifest.json").unlink()
    Path(root, "stages/one/manifest.json").unlink()
    with job_run(spec) as again:
        repeated = run_stage(spec, again, silent)
    assert [m.step for m in again.client.get_metric_history(again.id, "loss")] == [9, 10, 12]
    for name, weight in model_weights(f"{root}/stages/one/model").items():
        torch.testing.assert_close(weight, straight[name], rtol=0, atol=1e-6)
    assert repeated.report["tokens"] == report["tokens"]

    # The next stage goes on with optimizer and schedule, on another number of workers, too.
    second = FinetuneSpecification.model_validate(
        stage(root).model_dump(exclude={"job", "model"})
        | {"initial": "stages/one", "continue_schedule": True, "output": "stages/two", "steps": 1, "dropout": 0.0}
        | {"resources": {"workers": 1}, "schedule": {"kind": "cosine", "warmup_steps": 2, "total_steps": 100}}
    )
    with job_run(second) as run:
        manifest = run_stage(second, run, silent)
    assert "fresh optimizer" not in caplog.text
    assert manifest.report["schedule_step"] == 13
    assert run.latest()["loss"] < losses[0] - 0.5  # it did not start from scratch
    assert load(Path(root, "stages/two/model")).config.dropout == 0.0


def training_workers() -> list[psutil.Process]:
    """Ray Train's workers below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                found.append(process)
    return found


def when(happened: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Do something, from a thread, as soon as a condition holds."""

    def wait() -> None:
        while not happened():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def losses(run: Run) -> dict[int, float]:
    """Step -> loss, the newest where it was taken twice."""
    return {m.step: m.value for m in sorted(run.client.get_metric_history(run.id, "loss"), key=lambda m: m.timestamp)}


@pytest.mark.cluster
def test_a_killed_worker_changes_nothing(ray_cluster: None, root: str) -> None:
    """kill -9 after the first checkpoint: the group is started again, and every loss is that of the run that lost
    nobody. The groups that the last checkpoint remembers say which step was taken by which: each exactly once."""
    found: list[dict[int, float]] = []
    plain = {"steps": 80, "checkpoint_every": 20, "log_every": 1, "samples": [], "held_out": {}}
    for output, kill in (("stages/straight", False), ("stages/killed", True)):
        spec = stage(root, output=output, **plain)
        place = spec.locate(output)
        if kill:
            when(lambda place=place: catalog.newest_step(place) >= 20, lambda: training_workers()[-1].kill())
        with job_run(spec) as run:
            manifest = run_stage(spec, run, silent)
        found.append(losses(run))
    straight, killed = found
    groups = manifest.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2]
    assert groups[0]["step"] == 0
    assert 20 <= groups[1]["step"] < 80
    assert sorted(killed) == sorted(straight) == list(range(1, 81))
    assert killed == pytest.approx(straight, rel=1e-6)


@pytest.mark.cluster
def test_sigterm_ends_a_stage_with_a_checkpoint_and_the_same_command_goes_on(
    ray_cluster: None, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {"steps": 200, "micro_batches": 12, "checkpoint_every": 20, "log_every": 50}
    spec = stage(root, output="stages/stopped", **fields, samples=[], held_out={})
    place = spec.locate("stages/stopped")
    when(lambda: catalog.newest_step(place) >= 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with job_run(spec) as run, pytest.raises(SystemExit) as ended:
        run_stage(spec, run, silent)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = catalog.newest_step(place)
    assert 20 < stopped < 200
    assert f"stopped after step {stopped} (SIGTERM)" in caplog.text
    assert "the same command goes on" in caplog.text
    with job_run(spec) as run:
        manifest = run_stage(spec, run, silent)
    assert [group["step"] for group in manifest.report["groups"]] == [0, stopped]


@contextmanager
def machines(monkeypatch: pytest.MonkeyPatch, cpus: int, seconds: float) -> Iterator[Any]:
    """A cluster of this process whose nodes (raylets) come and go; a lost one is known to be so after `seconds`."""
    import ray
    from ray.cluster_utils import Cluster

    settings = {"RAY_health_check_period_ms": str(int(seconds * 1000 / 5)), "RAY_health_check_initial_delay_ms": "500"}
    for name, value in (connection.QUIET | connection.LEAN | settings).items():
        monkeypatch.setenv(name, value)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.WARNING)
        yield nodes
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        nodes.shutdown()
        for left in psutil.wait_procs(started, timeout=10)[1]:  # Ray Train's data manager may not notice the end
            if left.name().startswith("ray::"):
                left.kill()


def groups_so_far(place: str) -> list[dict[str, Any]]:
    """The groups of workers that the newest checkpoint remembers, and how many steps it has."""
    found = catalog.newest(place)
    return [*found.manifest.report["groups"], {"step": found.step, "workers": 0}] if found else []


def endless(root: str, output: str, **recovery: Any) -> PretrainSpecification:
    """A stage that takes steps until it is told to stop, and may change its size meanwhile."""
    return stage(
        root,
        output=output,
        micro_batches=6,
        checkpoint_every=10,
        log_every=1,
        samples=[],
        held_out={},
        optimizer={"learning_rate": 0.003},
        steps=100_000,
        schedule={"kind": "constant", "warmup_steps": 2, "total_steps": 100_000},
        resources={"cpus_per_worker": 1, **recovery},
    )


def until(trained: Future[Any], happened: Callable[[], bool]) -> None:
    """Wait for something that training brings about; what went wrong there is raised here."""
    when(lambda: happened() or trained.done(), lambda: None).join()
    if trained.done():
        trained.result()


def stopped(trained: Future[Any], place: str) -> int:
    """Have training stop; how many steps it has taken."""
    watchdog.notify(catalog.folder(place), "stop", "that is enough")
    with pytest.raises(Stopped, match="that is enough"):
        trained.result()
    return catalog.newest_step(place)


def undisturbed(root: str, steps: int) -> dict[int, float]:
    """The losses of so many steps on two workers to whom nothing happens."""
    # half a CPU: they and what reads data are two
    spec = endless(root, f"stages/undisturbed-{steps}", workers=2, cpus_per_worker=0.5)
    spec = spec.model_copy(update={"steps": steps})
    with job_run(spec) as run:
        run_stage(spec, run, silent)
    return losses(run)


@pytest.mark.cluster
@pytest.mark.slow  # five groups of workers, one after the other, on a cluster of its own: two minutes
def test_a_stage_grows_and_shrinks_with_the_cluster(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node joins, and later leaves without grace: the same losses as on two workers all along, up to rounding."""
    spec = endless(root, "stages/elastic", workers={"min": 1, "max": 3}, recovery={"resize_seconds": 2})
    place, pool = spec.locate(spec.output), ThreadPoolExecutor(1)

    def steps_of(number: int, workers: int) -> int:
        """How many steps the group of that number has taken."""
        found = groups_so_far(place)
        if len(found) < number + 1 or found[number - 1]["workers"] != workers:
            return 0
        return int(found[number]["step"] - found[number - 1]["step"])

    with machines(monkeypatch, cpus=2, seconds=2.5) as nodes:
        with job_run(spec) as run:
            trained = pool.submit(run_stage, spec, run, silent)
            until(trained, lambda: steps_of(1, workers=2) > 0)
            node = nodes.add_node(num_cpus=1)
            until(trained, lambda: steps_of(2, workers=3) >= 20)
            nodes.remove_node(node, allow_graceful=False)
            until(trained, lambda: steps_of(3, workers=2) >= 20)
            taken = stopped(trained, place)
        finishing = spec.model_copy(update={"steps": taken})
        with job_run(finishing) as finished_run:
            manifest = run_stage(finishing, finished_run, silent)
        expected = undisturbed(root, taken)
    assert [group["workers"] for group in manifest.report["groups"]] == [2, 3, 2]
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    assert "workers.png" in [artifact.path for artifact in run.client.list_artifacts(finished_run.id)]


@pytest.mark.cluster
@pytest.mark.slow  # seven groups of workers, one after the other, on a cluster of its own: minutes
def test_workers_and_nodes_lost_at_random_and_failing_storage_change_no_loss(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven blows in any order: a worker killed, a node gone (and another come), a checkpoint that cannot be written.
    Each step's loss is that of workers to whom nothing happened."""
    spec = endless(root, "stages/blows", workers={"min": 1, "max": 2}, recovery={"resize_seconds": 1000})
    place, pool = spec.locate(spec.output), ThreadPoolExecutor(1)
    chance = random.Random(7)
    blows = ["worker"] * 3 + ["node"] * 2 + ["storage"] * 2
    chance.shuffle(blows)
    with machines(monkeypatch, cpus=1, seconds=7.5) as nodes:
        node = nodes.add_node(num_cpus=1)
        with job_run(spec) as run:
            trained = pool.submit(run_stage, spec, run, silent)
            for blow in [*blows, ""]:
                goal = catalog.newest_step(place) + 20  # the next may still be from before the last blow
                until(trained, lambda goal=goal: catalog.newest_step(place) >= goal)
                time.sleep(chance.random())
                if blow == "worker":
                    chance.choice(training_workers()).kill()
                elif blow == "node":
                    nodes.remove_node(node, allow_graceful=False)
                    node = nodes.add_node(num_cpus=1)
                elif blow == "storage":  # where one of the next checkpoints belongs there is something else
                    storage.write_bytes(catalog.location(place, catalog.newest_step(place) + 30), b"")
            taken = stopped(trained, place)
            found = catalog.newest(place)
            assert found is not None
            found.manifest.verify(found.uri, content=True)
            groups = found.manifest.report["groups"]
        expected = undisturbed(root, taken)
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    assert len(groups) > blows.count("worker") + blows.count("node")


# -- ablation --


def ablation_of(root: str, **fields: Any) -> AblateSpecification:
    values: dict[str, Any] = {
        "storage": root,
        "mixture": {"tokens/pairs": 0.5, "tokens/lines": 0.5},
        "model": MODEL.model_copy(update={"dropout": 0.0}).model_dump(exclude={"vocabulary_size"}),
        "variants": {"all": {}, "no query-key norm": {"query_key_norm": False}, "no z-loss": {"z_loss": 0}},
        "learning_rates": [0.01],
        "z_loss": 0.1,
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "steps": 30,
        "micro_batches": 2,
    }
    return AblateSpecification.model_validate(values | fields)


def test_an_ablation_shows_what_each_stabilizer_bounds(root: str) -> None:
    spec = ablation_of(root)
    curves = {(name, 0.01): ablation.curve(spec, name, 0.01) for name in spec.variants}
    found = ablation.summary(curves)
    assert found["all, 0.01: loss"] < curves["all", 0.01][0]["loss"] - 0.5
    growth = {name: found[f"{name}, 0.01: query_norm"] / curves[name, 0.01][0]["query_norm"] for name in spec.variants}
    assert growth["no query-key norm"] > 2 * growth["all"]
    assert abs(found["all, 0.01: log_z"]) < abs(found["no z-loss, 0.01: log_z"])
    assert ablation.curve(spec, "all", 0.01) == curves["all", 0.01]  # the same again
    drawn = ablation.figure(spec, curves)
    assert {line.get_label() for line in drawn.axes[0].get_lines()} == set(spec.variants)


def test_a_variant_of_an_unknown_field_is_refused_by_its_name(root: str) -> None:
    with pytest.raises(ValidationError, match=r"variants\.odd: .*\n?.*qk_norm"):
        ablation_of(root, variants={"odd": {"qk_norm": False}})


# -- tokenizers --


def test_the_text_tokenizer_is_published_with_its_report(root: str) -> None:
    manifest = Manifest.read(f"{root}/tokenizers/text")
    manifest.verify(f"{root}/tokenizers/text", content=True)
    assert {entry.path for entry in manifest.files} == {"text_tokenizer.model", "vocabulary.json"}
    assert manifest.report["vocabulary_size"] == 320
    assert 1 < manifest.report["bytes_per_token"] < 20
    assert manifest.report["characters"] > 1000


def test_a_vocabulary_that_the_texts_do_not_support_is_refused(root: str, run: Run) -> None:
    spec = TextTokenizerSpecification(storage=root, documents=["curated/lines"], output="x", vocabulary_size=9000)
    with pytest.raises(SpecificationError, match="no BPE vocabulary of 9000 ids"):
        text_tokenizer.train_text_tokenizer(spec, run, silent)
    assert not storage.exists(f"{root}/x")


@pytest.fixture
def text_spec(root: str, tmp_path: Path) -> TextTokenizerSpecification:
    """Curated lines in a storage of their own, and a text tokenizer to be trained on them."""
    shutil.copytree(f"{root}/curated/lines", tmp_path / "curated/lines")
    return TextTokenizerSpecification(
        storage=str(tmp_path), documents=["curated/lines"], output="made", vocabulary_size=300, image_codes=4
    )


def test_a_tokenizer_is_replaced_by_a_trained_one_only_and_other_files_stay(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path
) -> None:
    first = text_tokenizer.train_text_tokenizer(text_spec, run, silent)
    (tmp_path / "made/notes.txt").write_text("mine")
    too_large = text_spec.model_copy(update={"vocabulary_size": 9000})
    with pytest.raises(SpecificationError, match="no BPE vocabulary"):
        text_tokenizer.train_text_tokenizer(too_large, run, silent)
    assert Manifest.read(str(tmp_path / "made")) == first
    first.verify(str(tmp_path / "made"), content=True)
    second = text_tokenizer.train_text_tokenizer(text_spec.model_copy(update={"image_codes": 8}), run, silent)
    assert (tmp_path / "made/notes.txt").read_text() == "mine"
    assert {entry.path for entry in second.files} == {"text_tokenizer.model", "vocabulary.json"}
    second.verify(str(tmp_path / "made"), content=True)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "is the storage itself"),
        (".", "is the storage itself"),
        ("curated/..", "is the storage itself"),
        ("/", "is the storage itself or holds it"),
        ("curated/lines", "overlaps with .*curated/lines"),
        ("curated", "overlaps with .*curated/lines"),
        ("curated/lines/tokenizer", "overlaps with .*curated/lines"),
        ("other", "holds 'curated', and no 'text_tokenizer'"),
    ],
)
def test_a_tokenizer_is_not_written_over_something_else(
    text_spec: TextTokenizerSpecification, run: Run, tmp_path: Path, output: str, said: str
) -> None:
    shutil.copytree(tmp_path / "curated/lines", tmp_path / "other")
    before = storage.sizes(str(tmp_path))
    with pytest.raises(SpecificationError, match=f"output: .*{said}"):
        text_tokenizer.train_text_tokenizer(text_spec.model_copy(update={"output": output}), run, silent)
    assert storage.sizes(str(tmp_path)) == before


def test_a_limit_of_characters_leaves_no_source_out() -> None:
    long = [Document((Text("a" * 50),)) for _ in range(100)]
    short = [Document((Text("b" * 10),)), Document((Image(picture(0)), Text("c" * 10)))]
    taken = "".join(text_tokenizer.up_to(text_tokenizer.texts([long, short]), 150))
    assert len(taken) == 150
    assert {"a", "b", "c"} == set(taken)


def test_each_worker_reads_its_share_of_the_images_and_a_sample_of_too_many() -> None:
    documents = [Document((Text("x"), Image(picture(i)), Image(picture(i + 50)))) for i in range(10)]
    everything = data.read_images(documents, 8)
    assert everything.shape == (20, 3, 8, 8)
    assert torch.equal(everything[0], torch.from_numpy(np.asarray(picture(0)).transpose(2, 0, 1).copy()))
    parts = [data.read_images(documents, 8, (rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 6]
    assert torch.equal(parts[1], everything[1::3])
    few = data.read_images(documents, 8, memory=5 * 3 * 64)
    assert len(few) == 5
    assert all(any(torch.equal(kept, image) for image in everything) for kept in few)


class Exact(ImageTokenizer):
    """Reconstructs every value as 0, whatever the codes."""

    def decode(self, codes_BN: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(codes_BN), 3, 8, 8)


def test_reconstruction_errors_are_in_their_units() -> None:
    tokenizer = Exact(
        ImageTokenizerConfig(resolution=8, codebook_size=4, embedding=4, base_channels=4, multipliers=[1])
    )
    white = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    found = measure.measure(tokenizer, white, batch=2)
    assert (found.squared, found.absolute) == pytest.approx((1.0, 127.5))
    assert 1 <= int(found.used_K.sum()) <= 4


@pytest.mark.cluster
def test_the_image_tokenizer_learns_and_uses_its_codebook_though_a_worker_is_killed(
    ray_cluster: None, root: str
) -> None:
    spec = ImageTokenizerSpecification(
        storage=root,
        tracking=Tracking(uri=f"{root}/mlflow"),
        documents=["curated/pairs"],
        held_out=["curated/pairs"],
        output="tokenizers/trained",
        resources=Resources(workers=2),
        model=ImageTokenizerConfig(
            resolution=8, codebook_size=CODES, embedding=8, base_channels=8, multipliers=[1, 2], residual_blocks=1
        ),
        steps=240,
        batch=8,
        learning_rate=3e-3,
        checkpoint_every=20,
    )
    when(lambda: catalog.newest_step(spec.training) >= 20, lambda: training_workers()[-1].kill())
    with job_run(spec) as run:
        manifest = train_image_tokenizer(spec, run, silent)
    groups = manifest.report["groups"]
    assert [group["workers"] for group in groups] == [2, 2]
    assert 20 <= groups[1]["step"] < 240
    experiment = run.client.get_run(run.id).info.experiment_id
    models = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{run.id}'")
    assert "step-00000240" in {model.name for model in models}
    before = [m.value for m in run.client.get_metric_history(run.id, "reconstruction")]
    assert before[-1] < 0.5 * before[0]
    assert manifest.report["image_reconstruction_error"] < 0.5 * before[0]
    assert manifest.report["codebook_used"] > 0.5
    assert [a.path for a in run.client.list_artifacts(run.id, "samples")] == ["samples/reconstructions.png"]
    assert finished(f"{root}/tokenizers/trained", spec) == manifest
    read = ImageTokenizer.read(f"{root}/tokenizers/trained")
    pixels = data.read_images(document_shards.read_documents(f"{root}/curated/pairs"), 8)
    assert measure.measure(read, pixels).squared == pytest.approx(
        manifest.report["image_reconstruction_error"], rel=1e-3
    )


# -- sample pictures --


def test_an_answer_is_drawn_with_all_of_its_parts() -> None:
    red = PILImage.new("RGB", (8, 8), "red")
    answer = Document((Text("here is one\nand more"), Image(red), Text("")))
    drawn = samples.render("Draw a red square.", answer)
    colors = {color for _, color in drawn.getcolors(1 << 20) or []}
    assert (255, 0, 0) in colors  # the image
    assert (0, 0, 0) in colors  # the text
    assert drawn.height > samples.render("Draw a red square.", Document((Text("here is one"),))).height
