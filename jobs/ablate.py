"""Job `ablate`: one small model, high learning rates, one stabilizer changed at a time (paper section 2.3)."""

import sys

from calumma.jobs.entry import main
from calumma.platform.training.trials.ablation import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("ablate"))
