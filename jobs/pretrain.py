"""Job `pretrain`: one pre-training stage on packed token shards (paper section 2.3)."""

from __future__ import annotations

import sys

from calumma.jobs.entry import main
from calumma.platform.cluster.progress import Progress
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tracking.run import Run
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.stage import run_stage


def run(spec: PretrainSpecification, run: Run, progress: Progress) -> Manifest:
    return run_stage(spec, run, progress)


if __name__ == "__main__":
    sys.exit(main("pretrain"))
