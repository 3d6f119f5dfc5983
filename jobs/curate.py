"""Job `curate`: raw files -> checked, ordered documents in Parquet shards."""

import sys

from calumma.platform.data.curate import run
from calumma.platform.runner import main

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("curate"))
