"""Job `train_text_tokenizer`: curated documents -> BPE text tokenizer and vocabulary (paper section 2.2)."""

from __future__ import annotations

import sys

from calumma.platform.config import TextTokenizerSpecification
from calumma.platform.data.manifest import Manifest
from calumma.platform.progress import Progress
from calumma.platform.runner import main
from calumma.platform.tracking import Run
from calumma.platform.training.text_tokenizer import train_text_tokenizer


def run(spec: TextTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    return train_text_tokenizer(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("train_text_tokenizer"))
