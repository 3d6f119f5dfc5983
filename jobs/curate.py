"""Job `curate`: raw files -> checked, ordered documents in Parquet shards."""

import sys

from calumma.jobs.entry import main
from calumma.platform.curation.curate import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("curate"))
