"""Job `train_image_tokenizer`: curated documents -> VQ image tokenizer (paper section 2.1)."""

from __future__ import annotations

import sys

from calumma.jobs.entry import main
from calumma.platform.cluster.progress import Progress
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.images.stage import train_image_tokenizer
from calumma.platform.training.specification import ImageTokenizerSpecification


def run(spec: ImageTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    return train_image_tokenizer(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("train_image_tokenizer"))
