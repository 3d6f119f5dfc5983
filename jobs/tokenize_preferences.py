"""Job `tokenize_preferences`: pairs of a wanted and an unwanted answer -> token shards, the two side by side."""

import sys

from calumma.jobs.entry import main
from calumma.platform.tokenizing.preferences import run

__all__ = ["run"]

if __name__ == "__main__":
    sys.exit(main("tokenize_preferences"))
