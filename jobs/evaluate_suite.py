"""Job `evaluate_suite`: a model or an endpoint on the benchmarks of the paper's tables, or of its safety test."""

import sys

from calumma.jobs.entry import main
from calumma.platform.evaluation.suite.running import evaluate_suite as run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("evaluate_suite"))
