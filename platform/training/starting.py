"""What a worker starts from: the engine with the weights of a checkpoint, of a model directory, or of a seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.assignment import Assignment
from calumma.platform.training.checkpoints import resumption
from calumma.platform.training.construction import build, heap
from calumma.platform.training.errors import TrainingFailed
from calumma.platform.training.group.watchdog import Watchdog
from calumma.platform.training.group.worker import Worker
from calumma.platform.training.standby import recall
from calumma.platform.training.standby.keeper import find_keeper, keeper_name
from calumma.platform.training.standby.recall import Held

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


_RESUMED_FIELDS = (
    "step",
    "schedule_step",
    "tokens",
    "pairs",
    "loss",
    "loss_text",
    "loss_image",
    "held_out_loss",
    "early",
    "held_out_step",
    "held_out_of",
    "faults",
    "incidents",
    "branches",
    "peak_flops",
)


def require_undamaged_start(assignment: Assignment) -> None:
    """A model directory that is started from is what its manifest says; checkpoints are checked as they are read. Every
    worker calls it. Raises TrainingFailed."""
    initial = assignment.initial if assignment.start_checkpoint is None else None
    if initial is not None and (manifest := Manifest.find(initial)) is not None:
        resumption.require_undamaged(initial, manifest)


def start_engine(assignment: Assignment, worker: Worker, watchdog: Watchdog) -> DeepSpeedEngine:
    """The engine of this worker, with the weights of the checkpoint to start from, of `initial`, or of the seed."""
    with heap.returned_at_once():
        return _start_engine(assignment, worker, watchdog)


def _start_engine(assignment: Assignment, worker: Worker, watchdog: Watchdog) -> DeepSpeedEngine:
    spec, start = assignment.spec, assignment.start_checkpoint
    watchdog.enter("building the engine")
    described = build.describe(assignment.config, spec, assignment.vocabulary)
    passes = assignment.division.passes(worker.world) if assignment.division else None
    run = build.initialize(described, spec, worker.world, worker.device, passes)
    source = described.source(assignment.config, base_of(assignment), worker.device)
    watchdog.enter("reading weights")
    try:
        build.fill(run, source, trained=start is None, beat=watchdog.beat)
    except storage.Damaged as error:
        raise TrainingFailed(f"{error}. Restore it from a copy, or start from another") from error
    if isinstance(start, Held):
        _recall(run, start, assignment.run.id)
    elif start is not None:
        own = assignment.resume is not None and not assignment.begins_branch
        resumption.load(run, start, own=own, beat=watchdog.beat, spec=spec)
    watchdog.enter("starting")
    return run


def _recall(run: DeepSpeedEngine, held: Held, identifier: str) -> None:
    """The state of a copy in memory. Where it cannot be read all copies are given up, and the group starts over."""
    import ray

    try:
        recall.load(run, held, keeper_name(identifier, ray.get_runtime_context().get_node_id()), find_keeper)
    except recall.CopyLost:
        recall.give_up(identifier)
        raise


def base_of(assignment: Assignment) -> build.Base:
    """Of the checkpoint to start from, whose weights that are not trained are not in it; or the starting weights."""
    start = assignment.start_checkpoint
    if start is not None:
        return build.Base(**start.manifest.report["base"])
    checkpoint = assignment.initial_checkpoint
    return build.Base(checkpoint.uri if checkpoint else assignment.initial, assignment.spec.seed)


def report_so_far(assignment: Assignment) -> dict[str, Any]:
    own = {"run": assignment.run.id, "architecture": assignment.config.model_dump(mode="json")}
    if assignment.resume is None:
        return {"step": 0, "schedule_step": assignment.offset, "tokens": {"text": 0.0, "image": 0.0}} | own
    report = {key: value for key, value in assignment.resume.manifest.report.items() if key in _RESUMED_FIELDS}
    if assignment.begins_branch:
        report["branches"] = [*report.get("branches", []), assignment.branch]
        report["faults"] = report.get("faults", {}) | {"in_a_row": 0}  # with what was changed they count anew
    return report | own
