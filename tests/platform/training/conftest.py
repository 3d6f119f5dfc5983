"""A small corpus with its tokenizers and token shards, a stage that trains on it, and what a cluster's tests share."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.platform import storage
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import Tracking
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing import text_tokenizer
from calumma.platform.tokenizing.specification import TextTokenizerSpecification, TokenizeSpecification
from calumma.platform.tracking.job_run import job_run
from calumma.platform.tracking.run import Run
from calumma.platform.training.specification import PretrainSpecification

MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=64, dropout=0.1)
CODES = 16


def publish_tokens(root: str, name: str) -> None:
    from calumma.platform.tokenizing.actor import TokenizingActor

    spec = TokenizeSpecification(storage=root, documents=[f"curated/{name}"], context=MODEL.context, micro_batch=2)
    output = storage.join(root, "tokens", name)
    made = TokenizingActor(spec.model_dump(mode="json"))(
        {
            "shards": document_shards.shards(f"{root}/curated/{name}"),
            "seed": 0,
            "output": output,
            "shard_prefix": "tokens",
            "receipt": storage.join(root, "receipt.json"),
        },
    )
    files = [FileEntry.model_validate(entry) for entry in made["files"]]
    Manifest(kind="tokens", files=files, specification=spec.model_dump(mode="json")).write(output)


@pytest.fixture(scope="session")
def root(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Storage with curated documents, tokenizers and token shards: pictures with captions, lines of text."""
    root = str(tmp_path_factory.mktemp("training"))
    shutil.copytree(f"{corpus}/curated", f"{root}/curated")
    spec = TextTokenizerSpecification(
        storage=root,
        documents=["curated/pairs", "curated/lines"],
        vocabulary_size=320,
        image_codes=CODES,
        tracking=Tracking(uri=f"{root}/mlflow"),
    )
    with job_run(spec) as run:
        text_tokenizer.train_text_tokenizer(spec, run, no_progress)
    torch.manual_seed(0)
    shape = ImageTokenizerConfig(
        resolution=8, codebook_size=CODES, embedding=4, base_channels=4, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(f"{root}/tokenizers/image")
    for name in ("pairs", "lines"):
        publish_tokens(root, name)
    return root


@pytest.fixture(scope="session")
def shape() -> ModelConfig:
    """Of the models of `stage`, without a vocabulary."""
    return MODEL


@pytest.fixture(scope="session")
def stage(root: str) -> Callable[..., PretrainSpecification]:
    """stage(**fields): twelve steps of two workers on all of the corpus."""

    def stage(**fields: Any) -> PretrainSpecification:
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

    return stage


@pytest.fixture
def run(stage: Callable[..., PretrainSpecification]) -> Iterator[Run]:
    """The MLflow run of a stage."""
    with job_run(stage()) as current:
        yield current


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A torch.distributed group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# -- of a cluster --


@pytest.fixture(scope="session")
def training_workers() -> Callable[[], list[psutil.Process]]:
    """Ray Train's workers below this process."""

    def found() -> list[psutil.Process]:
        workers = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                    workers[process.pid] = process.ppid(), process
        # a worker that starts another program has its own name in it for a moment
        return [process for parent, process in workers.values() if parent not in workers]

    return found


@pytest.fixture(scope="session")
def when() -> Callable[[Callable[[], bool], Callable[[], object]], threading.Thread]:
    """when(happened, act): do something, from a thread, as soon as a condition holds."""

    def when(happened: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
        def wait() -> None:
            while not happened():
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    return when


@pytest.fixture(scope="session")
def losses() -> Callable[[Run], dict[int, float]]:
    """losses(run): step -> loss, the newest where it was taken twice."""

    def losses(run: Run) -> dict[int, float]:
        history = sorted(run.client.get_metric_history(run.id, "loss"), key=lambda metric: metric.timestamp)
        return {metric.step: metric.value for metric in history}

    return losses
