"""The quickstart as a speed-run: seconds of every step and what it learned, over several seeds.

    python benchmarks/speedrun.py                       # three seeds, one after the other
    python benchmarks/speedrun.py --seeds 0 --workdir speedrun

Each run is `calumma quickstart --seed N` in a folder of its own, from nothing to answers over HTTP; its data and their
split are the same for all seeds. A run that is finished is not run again. Held-out scans are only asked about at the
end: nothing here or in the recipes is chosen by them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

TARGETS = {
    "recognition_accuracy": 0.97,
    "generation_accuracy": 0.97,
    "generation_diversity_of_real": 0.8,
    "interleaved_digits": 0.98,
    "interleaved_valid": 1.0,
}
SECONDS = 240.0


def run(folder: Path, seed: int) -> dict[str, Any]:
    """results.json of a run, with the wall seconds of the whole command and the load that it met and made."""
    told = folder / "speedrun.json"
    if not told.is_file():
        began, before = time.monotonic(), os.getloadavg()[0]
        command = [str(Path(sys.executable).with_name("calumma")), "quickstart"]
        subprocess.run([*command, "--workdir", str(folder), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
        taken = time.monotonic() - began
        told.write_text(json.dumps({"wall": taken, "load": [before, os.getloadavg()[0]]}))
    return json.loads((folder / "results.json").read_text()) | json.loads(told.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("speedrun"), help="a folder for each seed is made in it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    runs = {seed: run(options.workdir / str(seed), seed) for seed in options.seeds}
    print("\n| seed | all steps | command | load before, after", *TARGETS, sep=" | ", end=" |\n")
    print("| --- " * (4 + len(TARGETS)) + "|")
    for seed, found in runs.items():
        before, after = found["load"]
        figures = " | ".join(f"{found[name]:.1%}" for name in TARGETS)
        taken = f"{sum(found['seconds'].values()):.0f} s | {found['wall']:.0f} s"
        print(f"| {seed} | {taken} | {before:.1f}, {after:.1f} | {figures} |")
    means = {name: fmean(found[name] for found in runs.values()) for name in TARGETS}
    seconds = fmean(sum(found["seconds"].values()) for found in runs.values())
    print(f"| mean | {seconds:.0f} s | | | " + " | ".join(f"{means[name]:.1%}" for name in TARGETS) + " |")
    print(f"| target | {SECONDS:.0f} s | | | " + " | ".join(f"{target:.0%}" for target in TARGETS.values()) + " |")


if __name__ == "__main__":
    main()
