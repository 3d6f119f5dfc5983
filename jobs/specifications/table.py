"""The table of all jobs: the name in `job:`, the specification it stands for, and the function that does it."""

from __future__ import annotations

import importlib

from calumma.platform.cluster.runner import Job
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.evaluation.specification import EvaluateSpecification
from calumma.platform.evaluation.suite.specification import SuiteSpecification
from calumma.platform.specification import JobSpecification
from calumma.platform.tokenizing.specification import (
    PreferenceTokensSpecification,
    TextTokenizerSpecification,
    TokenizeSpecification,
)
from calumma.platform.training.specification import (
    FinetuneSpecification,
    ImageTokenizerSpecification,
    PretrainSpecification,
)
from calumma.platform.training.trials.specification import AblateSpecification, LadderSpecification

JOBS: dict[str, type[JobSpecification]] = {
    "curate": CurateSpecification,
    "train_text_tokenizer": TextTokenizerSpecification,
    "train_image_tokenizer": ImageTokenizerSpecification,
    "tokenize": TokenizeSpecification,
    "tokenize_preferences": PreferenceTokensSpecification,
    "pretrain": PretrainSpecification,
    "finetune": FinetuneSpecification,
    "evaluate": EvaluateSpecification,
    "evaluate_suite": SuiteSpecification,
    "ablate": AblateSpecification,
    "ladder": LadderSpecification,
}


def job_function(name: str) -> Job:
    """`run(specification, run, progress) -> Manifest` of `jobs/NAME.py`."""
    function: Job = importlib.import_module(f"calumma.jobs.{name}").run
    return function
