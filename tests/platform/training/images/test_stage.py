"""The image tokenizer's training on a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import pytest

from calumma.model.config import ImageTokenizerConfig
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.platform.cluster.progress import no_progress
from calumma.platform.shards import documents as document_shards
from calumma.platform.specification import Resources, Tracking
from calumma.platform.tracking.fingerprints import unchanged_result
from calumma.platform.tracking.job_run import job_run
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.images import data, measure
from calumma.platform.training.images.stage import train_image_tokenizer
from calumma.platform.training.specification import (
    ImageTokenizerSpecification,
)

When = Callable[[Callable[[], bool], Callable[[], object]], threading.Thread]
TrainingWorkers = Callable[[], list[psutil.Process]]


@pytest.mark.cluster
def test_the_image_tokenizer_learns_and_uses_its_codebook_though_a_worker_is_killed(
    ray_cluster: None, root: str, when: When, training_workers: TrainingWorkers
) -> None:
    spec = ImageTokenizerSpecification(
        storage=root,
        tracking=Tracking(uri=f"{root}/mlflow"),
        documents=["curated/pairs"],
        held_out=["curated/pairs"],
        output="tokenizers/trained",
        resources=Resources(workers=2),
        model=ImageTokenizerConfig(
            resolution=8, codebook_size=16, embedding=8, base_channels=8, multipliers=[1, 2], residual_blocks=1
        ),
        steps=240,
        batch=8,
        learning_rate=3e-3,
        checkpoint_every=20,
    )
    when(lambda: catalog.newest_step(spec.training) >= 20, lambda: training_workers()[-1].kill())
    with job_run(spec) as run:
        manifest = train_image_tokenizer(spec, run, no_progress)
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
    assert unchanged_result(f"{root}/tokenizers/trained", spec) == manifest
    read = ImageTokenizer.read(f"{root}/tokenizers/trained")
    pixels = data.read_images(document_shards.read_documents(f"{root}/curated/pairs"), 8)
    assert measure.measure_reconstruction(read, pixels).squared == pytest.approx(
        manifest.report["image_reconstruction_error"], rel=1e-3
    )
