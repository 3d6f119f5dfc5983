"""Job `evaluate`: recognition, generation and interleaved tasks, judged by an independent classifier."""

import sys

from calumma.platform.evaluation.benchmark import evaluate as run
from calumma.platform.runner import main

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("evaluate"))
