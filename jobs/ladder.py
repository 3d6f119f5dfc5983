"""Job `ladder`: small models at rising sizes, a scaling law fitted to them, its prediction checked by a larger one."""

import sys

from calumma.jobs.entry import main
from calumma.platform.training.trials.ladder import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("ladder"))
