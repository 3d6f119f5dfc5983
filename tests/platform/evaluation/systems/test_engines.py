"""Workers on a cluster: answers in the order of the prompts, and one that is lost costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from calumma.model.document import Document, Text
from calumma.platform.evaluation.systems.engines import ClusterSystem, LocalSystem
from calumma.platform.evaluation.systems.prompts import Prompt, Sampling
from calumma.platform.evaluation.systems.specification import PictureSampling, SystemSpecification
from calumma.platform.specification import Resources, Tracking, WorkerRange

WORDS = ("red", "blue", "square", "circle", "bread", "box", "yellow", "answer")


def drawn(model: Path, pictures: PictureSampling | None) -> list[bytes]:
    """What two seeds draw of one prompt."""
    prompts = [Prompt(Document((Text("A red", "user"),)), Sampling(mode="image", seed=seed)) for seed in (1, 2)]
    with LocalSystem(SystemSpecification.of(str(model), pictures=pictures), Tracking()) as system:
        return [answer.document.images[0].open().tobytes() for answer in system.answer(prompts)]


def test_pictures_are_drawn_as_the_system_says(model_directory: Path) -> None:
    first, second = drawn(model_directory, None)
    assert first != second
    first, second = drawn(model_directory, PictureSampling(temperature=0.0))
    assert first == second
    guided, plain = (drawn(model_directory, PictureSampling(temperature=0.0, guidance_text=g)) for g in (9.0, 1.0))
    assert guided != plain


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_is_lost_costs_nothing(model_directory: Path) -> None:
    import ray

    spec = SystemSpecification.of(str(model_directory), batch=1)
    prompts = [Prompt(Document((Text(f"A {word} and"),)), Sampling(max_tokens=4)) for word in WORDS]
    with LocalSystem(spec, Tracking()) as local:
        expected = [answer.document.text for answer in local.answer(prompts)]
    with ClusterSystem(spec, Tracking(), Resources(workers=WorkerRange(min=1, max=1), cpus_per_worker=0.5)) as system:
        killed: list[int] = []

        def kill(done: int, total: int) -> None:
            if not killed:
                killed.append(done)
                ray.kill(system._ready[0], no_restart=False)

        assert [answer.document.text for answer in system.answer(prompts, kill)] == expected
        assert killed == [4]
