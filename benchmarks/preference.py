"""Preferences on interleaved answers: what DPO, IPO and ORPO make of the quickstart's tuned model, whose counting with
pictures is judged by the digits that it draws.

    python benchmarks/preference.py quickstart/storage                 # some ten minutes on two cores
    python benchmarks/preference.py quickstart/storage --losses dpo --trainings 3 --seeds 8

The pairs are the model's own answers to the questions of training: of one question an answer whose every digit the
judge finds right, and one with a wrong digit or more; where it has none that is right, the training's own. The judge is
a classifier trained on training scans. Then the model, before and after, answers the held-out questions with several
seeds each, the same before and after, so that every answer has its counterpart: what is gained is the mean of their
differences, over several trainings with other seeds, beside its standard error over the questions and the p-value of a
paired t-test. Everything is done by the jobs tokenize_preferences and finetune.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from calumma.jobs.specifications.table import job_function
from calumma.model import MixedModalModel, generate, load
from calumma.model.document import Document, Image, Text
from calumma.model.generation import SamplingParams
from calumma.platform.cluster import connection, runner
from calumma.platform.evaluation.evaluate import sampling_params
from calumma.platform.evaluation.judge import Judge
from calumma.platform.evaluation.tasks import Case, Grade, grade, make_case
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import JobSpecification, Tracking
from calumma.platform.tokenizing.specification import PreferenceTokensSpecification
from calumma.platform.training.sections import Preference
from calumma.platform.training.specification import FinetuneSpecification

TRAINING, HELD_OUT = "curated/chat_counting", "curated/ask_counting"
SETTINGS = {
    "dpo": Preference(loss="dpo", beta=0.1, chosen_weight=0.2),
    "ipo": Preference(loss="ipo", beta=0.5, chosen_weight=0.2),
    "orpo": Preference(loss="orpo", beta=0.5),
}
RATES = {"dpo": 2e-4, "ipo": 2e-4, "orpo": 2e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("storage", type=Path, help="the storage of a finished quickstart")
    parser.add_argument("--model", type=Path, help="default: that of the quickstart's fine-tuning")
    parser.add_argument("--losses", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--questions", type=int, default=400, help="of training, to be answered")
    parser.add_argument("--samples", type=int, default=4, help="answers to each")
    parser.add_argument("--seeds", type=int, default=12, help="answers to each held-out question")
    parser.add_argument("--first-seed", type=int, default=0, help="of these answers")
    parser.add_argument("--trainings", type=int, default=3, help="of each loss, with a seed of its own each")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, help="learning rate; default: of the loss")
    parser.add_argument("--workdir", type=Path, help="keep pairs and models here; default: a folder that is removed")
    given = parser.parse_args()
    storage = given.storage.absolute()
    base = (given.model or storage / "stages/finetuned/model").absolute()
    judge = Judge.train(_labelled(storage / "curated/scans_train"))
    model = load(base)
    with nullcontext(given.workdir) if given.workdir else tempfile.TemporaryDirectory() as folder:
        work = Path(folder).absolute()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "pairs.jsonl").is_file():
            pairs = make_pairs(model, storage, judge, given.questions, given.samples)
            (work / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        count = len((work / "pairs.jsonl").read_text().splitlines())
        print(
            f"{count} pairs; the judge is right of {judge.accuracy(_labelled(storage / 'curated/scans_held_out')):.3f}"
        )
        before = held_out_grades(model, storage, judge, given.seeds, given.first_seed)
        print(_line("before", measured(before), 0))
        with connection.embedded(lean=True):
            for loss in given.losses:
                trained = []
                for seed in range(given.trainings):
                    began = time.monotonic()
                    tuned = tune(work, base, loss, given.steps, given.rate or RATES[loss], seed)
                    seconds = time.monotonic() - began
                    grades = held_out_grades(load(tuned), storage, judge, given.seeds, given.first_seed)
                    trained.append(grades)
                    print(_line(loss, measured(grades), seconds), flush=True)
                print(f"{loss}: {gained(before, trained, given.seeds)}", flush=True)


def make_pairs(
    model: MixedModalModel, storage: Path, judge: Judge, questions: int, samples: int
) -> list[dict[str, Any]]:
    """Records as LLaMA-Factory has them, with the images in the answers."""
    documents = list(read_documents(str(storage / TRAINING)))[:questions]
    cases = [make_case("interleaved", document) for document in documents]
    asked = [case for case in cases for _ in range(samples)]
    answers, grades = answered(model, asked, judge, seed=1_000)
    pairs: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        own = slice(number * samples, (number + 1) * samples)
        several = list(zip(answers[own], grades[own], strict=True))
        right = [answer for answer, each in several if _right(each)]
        chosen = right[0] if right else case.expected
        for rejected in [answer for answer, each in several if not _right(each)]:
            (first, pictures), (second, others) = _marked(chosen), _marked(rejected)
            pairs.append(
                {
                    "conversations": [{"from": "human", "value": case.prompt.text}],
                    "chosen": {"from": "gpt", "value": first},
                    "rejected": {"from": "gpt", "value": second},
                    "images": pictures + others,
                }
            )
    return [pair for pair in pairs if pair["rejected"]["value"].strip()]


def answered(
    model: MixedModalModel, cases: Sequence[Case], judge: Judge, seed: int
) -> tuple[list[Document], list[Grade]]:
    params: list[SamplingParams] = [
        sampling_params(case, seed + number, model.image_length, len(model.encode(case.expected)))
        for number, case in enumerate(cases)
    ]
    answers = generate(model, [case.prompt for case in cases], params, max_sequences=32)
    return answers, [grade(case, answer, judge.classify) for case, answer in zip(cases, answers, strict=True)]


def held_out_grades(model: MixedModalModel, storage: Path, judge: Judge, seeds: int, first: int) -> list[Grade]:
    """Of answers to the held-out questions, each with so many seeds."""
    cases = [make_case("interleaved", document) for document in read_documents(str(storage / HELD_OUT))]
    return answered(model, [case for case in cases for _ in range(seeds)], judge, seed=first)[1]


def gained(before: Sequence[Grade], trained: Sequence[Sequence[Grade]], seeds: int) -> str:
    """Points of digits right that the trainings gain over the model before them, question by question: the answers to
    one depend on each other."""
    from scipy.stats import ttest_1samp

    weights = np.array([len(each.digits) for each in before], float)
    rights = np.array([[sum(each.digits) for each in grades] for grades in (before, *trained)], float)
    # of each question, in digits, scaled so that their mean is the difference of shares
    points = (100 * (rights[1:].mean(axis=0) - rights[0]) / weights.mean()).reshape(-1, seeds).mean(axis=1)
    error, p = points.std(ddof=1) / len(points) ** 0.5, ttest_1samp(points, 0).pvalue
    gain = f"{points.mean():+.1f} points of digits right"
    return f"{gain}, standard error {error:.1f} over {len(points)} questions, p {p:.2g}"


def measured(grades: Sequence[Grade]) -> dict[str, float]:
    """Shares of all answers or digits."""
    return {
        "valid": fmean(each.right for each in grades),
        "words": fmean(each.words for each in grades),
        "digits": fmean(digit for each in grades for digit in each.digits),
        "all right": fmean(_right(each) for each in grades),
        "count": float(sum(len(each.digits) for each in grades)),
    }


def tune(work: Path, base: Path, loss: str, steps: int, rate: float, seed: int) -> Path:
    """The tuned model's directory."""
    shared: dict[str, Any] = {"storage": str(work), "tracking": Tracking(uri=f"sqlite:///{work}/mlflow.db")}
    tokenizers = {"text_tokenizer": str(base), "image_tokenizer": str(base / "image_tokenizer")}
    shape = json.loads((base / "config.json").read_text())
    output = f"{loss}-{seed}"
    _job(
        PreferenceTokensSpecification(
            **shared,
            **tokenizers,
            resources={"workers": 0},
            location="pairs.jsonl",
            output="pairs",
            held_out=0.1,
            context=shape["context"],
            micro_batch=4,
        )
    )
    spec = FinetuneSpecification(
        **shared, **tokenizers, resources={"workers": 1, "cpus_per_worker": 2}, mixture={"pairs/train": 1.0},
        held_out={"pairs": "pairs/held_out"}, output=output, initial=str(base), steps=steps, micro_batches=4,
        max_epochs=1000, dropout=0.0, preference=SETTINGS[loss], optimizer={"learning_rate": rate},
        schedule={"kind": "cosine", "warmup_steps": max(1, steps // 10), "final": 0.1}, precision="float32",
        checkpoint_every=steps, log_every=max(1, steps // 10), seed=seed,
    )  # fmt: skip
    manifest = _job(spec)
    print(f"  {output}: held-out pairs {manifest.report['held_out'].get('pairs')}")
    return work / output / "model"


def _job(spec: JobSpecification) -> Any:
    return runner.run_job(spec, job_function(spec.job))[0]


def _right(graded: Grade) -> bool:
    return graded.right and graded.words and all(graded.digits)


def _marked(answer: Document) -> tuple[str, list[str]]:
    """Text with a mark for each image, and the images as data URLs."""
    words, pictures = "", []
    for segment in answer.segments:
        if isinstance(segment, Text):
            words += segment.text
        elif isinstance(segment, Image):
            words += "<image>"
            pictures.append("data:image/png;base64," + base64.b64encode(segment.png()).decode())
    return words, pictures


def _labelled(folder: Path) -> list[Any]:
    return [
        (image.open(), image.caption)
        for document in read_documents(str(folder))
        for image in document.images
        if image.caption
    ]


def _line(name: str, found: dict[str, float], seconds: float) -> str:
    shares = "  ".join(f"{key} {100 * value:5.1f} %" for key, value in found.items() if key != "count")
    return f"{name:8}{shares}  ({found['count']:.0f} digits{f', {seconds:.0f} s of training' if seconds else ''})"


if __name__ == "__main__":
    main()
