"""The quickstart in colour without training it: `python benchmarks/emoji.py`.

What one optimizer step of its recipes costs in processor seconds (which tell what a quiet machine would take, on one
that is not), and how often the judge of its drawings is right about real pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from calumma.jobs.emoji import documents
from calumma.jobs.emoji.course import COLOUR
from calumma.jobs.emoji.pictures import Picture
from calumma.jobs.quickstart.steps import Options, step_specification
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.transformer import Transformer
from calumma.platform.evaluation.judge import Judge
from calumma.platform.training.specification import ImageTokenizerSpecification, PretrainSpecification

MICRO_BATCH, VOCABULARY, COPIES = 4, 1536, 3


def main() -> None:
    torch.set_num_threads(1)
    options = Options(Path("colour"), course=COLOUR)
    image = step_specification("train_image_tokenizer", options)
    stages = [step_specification(name, options) for name in ("stage1", "stage2", "finetune")]
    assert isinstance(image, ImageTokenizerSpecification)
    seconds = image_step(image)
    print(
        f"image tokenizer: {seconds:.2f} s a step, {image.steps} steps: {image.steps * seconds / 60:.0f} core-minutes"
    )
    seconds = micro_batch(stages[0])  # type: ignore[arg-type]
    passes = sum(stage.steps * stage.micro_batches for stage in stages)  # type: ignore[attr-defined]
    print(f"Transformer: {seconds:.2f} s a pass, {passes} passes: {passes * seconds / 60:.0f} core-minutes")
    train, held_out = documents.pictures(step_specification("documents", options))  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    shown = moved(train, random, COPIES)
    print(f"judge, {len(held_out)} combinations it has not seen: {told(shown, labelled(held_out))}")
    shown += moved(held_out, random, COPIES)
    fresh = [(p.moved(random).picture(), p.word) for p in held_out]
    print(f"judge, moved copies of combinations it has seen: {told(shown, fresh)}")


def cost(step: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """Processor seconds of a step: the median of three behind a first one."""
    found = []
    for _ in range(4):
        begin = time.process_time()
        step().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(time.process_time() - begin)
    return statistics.median(found[1:])


def image_step(spec: ImageTokenizerSpecification) -> float:
    model = ImageTokenizer(spec.model)
    x_BCHW = torch.rand(spec.batch, 3, spec.model.resolution, spec.model.resolution) * 2 - 1

    def step() -> torch.Tensor:
        made = model(x_BCHW)
        return (made.x_BCHW - x_BCHW).abs().mean() + made.codebook_loss + 0.25 * made.commitment_loss

    return cost(step, torch.optim.AdamW(model.parameters()))


def micro_batch(spec: PretrainSpecification) -> float:
    assert spec.model is not None
    config = spec.model.model_copy(update={"vocabulary_size": VOCABULARY})
    model = Transformer(config).initialize(0)
    ids_BT = torch.randint(0, VOCABULARY, (MICRO_BATCH, config.context + 1))

    def step() -> torch.Tensor:
        return F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten())

    return cost(step, torch.optim.AdamW(model.parameters()))


Labelled = list[tuple[object, str]]


def labelled(pictures: list[Picture]) -> Labelled:
    return [(p.picture(), p.word) for p in pictures]


def moved(pictures: list[Picture], random: np.random.Generator, copies: int) -> Labelled:
    return labelled(pictures) + [(p.moved(random).picture(), p.word) for _ in range(copies) for p in pictures]


def told(training: Labelled, asked: Labelled) -> str:
    marks = np.array(Judge.train(training, "colour", 3).marks(asked))  # type: ignore[arg-type]
    parts = ", ".join(
        f"{name} {share:.0%}" for name, share in zip(("thing", "skin", "style"), marks.mean(0), strict=True)
    )
    return f"{parts}, all {marks.all(1).mean():.0%}"


if __name__ == "__main__":
    main()
