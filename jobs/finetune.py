"""Job `finetune`: supervised fine-tuning on packed conversations, the loss on answers only (paper section 3)."""

from __future__ import annotations

import sys

from calumma.jobs.entry import main
from calumma.platform.cluster.progress import Progress
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.specification import FinetuneSpecification
from calumma.platform.training.stage import run_stage


def run(spec: FinetuneSpecification, run: Run, progress: Progress) -> Manifest:
    return run_stage(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("finetune"))
