"""Job `tokenize`: curated documents -> packed token shards, a row group a micro-batch."""

import sys

from calumma.platform.data.tokenize import run
from calumma.platform.runner import main

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("tokenize"))
