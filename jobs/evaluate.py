"""Job `evaluate`: recognition, generation and interleaved tasks, judged by an independent classifier."""

import sys

from calumma.jobs.entry import main
from calumma.platform.evaluation.evaluate import evaluate as run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("evaluate"))
