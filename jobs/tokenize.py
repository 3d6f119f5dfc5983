"""Job `tokenize`: curated documents -> packed token shards, a row group a micro-batch."""

import sys

from calumma.jobs.entry import main
from calumma.platform.tokenizing.tokenize import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("tokenize"))
