"""Job `pretrain`: one pre-training stage on packed token shards (paper section 2.3)."""

from __future__ import annotations

import sys

from calumma.platform.config import PretrainSpecification
from calumma.platform.data.manifest import Manifest
from calumma.platform.progress import Progress
from calumma.platform.runner import main
from calumma.platform.tracking import Run
from calumma.platform.training.stage import run_stage


def run(spec: PretrainSpecification, run: Run, progress: Progress) -> Manifest:
    return run_stage(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("pretrain"))
