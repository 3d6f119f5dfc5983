"""Evaluate a model on recognition, generation and interleaved tasks. `python -m calumma.jobs.evaluate --config FILE`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from calumma.platform.config import EvaluateSpecification
from calumma.platform.evaluation.benchmark import evaluate
from calumma.platform.progress import Progress

if TYPE_CHECKING:
    from calumma.platform.data.manifest import Manifest
    from calumma.platform.tracking import Run


def run(spec: EvaluateSpecification, run: Run, progress: Progress) -> Manifest:
    return evaluate(spec, run, progress)


if __name__ == "__main__":
    from calumma.platform.runner import main

    sys.exit(main("evaluate"))
