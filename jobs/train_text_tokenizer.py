"""Job `train_text_tokenizer`: curated documents -> BPE text tokenizer and vocabulary (paper section 2.2)."""

from __future__ import annotations

import sys

from calumma.jobs.entry import main
from calumma.platform.cluster.progress import Progress
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.specification import TextTokenizerSpecification
from calumma.platform.tokenizing.text_tokenizer import train_text_tokenizer
from calumma.platform.tracking.run import Run


def run(spec: TextTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    return train_text_tokenizer(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("train_text_tokenizer"))
