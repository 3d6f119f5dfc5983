"""Job `train_image_tokenizer`: curated documents -> VQ image tokenizer (paper section 2.1)."""

from __future__ import annotations

import sys

from calumma.platform.config import ImageTokenizerSpecification
from calumma.platform.data.manifest import Manifest
from calumma.platform.progress import Progress
from calumma.platform.runner import main
from calumma.platform.tracking import Run
from calumma.platform.training.image_tokenizer import train_image_tokenizer


def run(spec: ImageTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    return train_image_tokenizer(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("train_image_tokenizer"))
