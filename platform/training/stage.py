"""One training stage from the driver: check, plan, start the workers, register the model, publish the manifest.

OUTPUT/checkpoints/...  OUTPUT/model/ (a model directory)  OUTPUT/manifest.json (last)
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from calumma.platform import specification, storage
from calumma.platform.cluster import capacity
from calumma.platform.cluster.progress import Progress
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import MANIFEST, FileEntry, Manifest
from calumma.platform.streaming import mixture
from calumma.platform.tracking import provenance, registry
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training import loop
from calumma.platform.training.assignment import Assignment
from calumma.platform.training.checkpoints import branch, catalog
from calumma.platform.training.group import notice
from calumma.platform.training.group.chart import worker_groups, worker_range
from calumma.platform.training.group.control import worker_control
from calumma.platform.training.group.fit import fit
from calumma.platform.training.preparation import prepare, require_divisible
from calumma.platform.training.publication import ADAPTER_FOLDER, MODEL_FOLDER
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.standby.rehearsal import rehearse

logger = logging.getLogger(__name__)
KIND = "stage"


def run_stage(spec: TrainSpecification, run: Run, progress: Progress) -> Manifest:
    """Train a stage to its end, going on from its newest checkpoint, and publish it.

    Raises SpecificationError before anything starts, TrainingFailed, StorageError, TrackingError.
    """
    from calumma.platform.streaming.plan import PlanError
    from calumma.platform.streaming.tensors import PlanData

    began = time.monotonic()
    original, spec = spec, mixture.resolve_mixture(specification.with_absolute_storage(spec))
    number = capacity.require_workers(spec.resources) // spec.sequence_parallel * spec.sequence_parallel
    assignment = prepare(spec, run)
    weights = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
    manifests = {uri: Manifest.read(uri) for uri in weights}
    reader = spec.data.reader()
    try:
        data = PlanData(
            spec.seed,
            weights,
            manifests,
            spec.micro_batches,
            spec.steps,
            verify=reader.verify,
            cache=reader.cache,
            rows=spec.rows_per_pass,
            whole=assignment.whole_passes,
            sharing=spec.sequence_parallel,
        )
    except PlanError as error:
        raise SpecificationError(f"mixture: {error}") from error
    if data.plan.context is not None and data.plan.context > assignment.config.context:
        raise SpecificationError(
            f"the token shards hold sequences of {data.plan.context} tokens, the model's context is "
            f"{assignment.config.context}: tokenize with a smaller `context`, or enlarge `model.context`"
        )
    require_divisible(spec, assignment.config, data.plan.context)
    epochs = mixture.check_epochs(spec, data.plan)
    passed = {uri: count / spec.steps for uri, count in epochs.items()}
    assignment = replace(assignment, epochs_a_step=passed, division=data.plan.division)
    _begin(assignment)
    copied = spec.resources.recovery.copy_every is not None
    finished = assignment.first_step >= spec.steps  # only what follows training is missing
    report = fit(
        loop.train_from_newest,
        {"assignment": assignment},
        workers=worker_range(spec, number),
        resources=spec.resources,
        name=spec.job,
        run=run,
        steps=spec.steps,
        progress=progress,
        data=None if finished else data,
        control=worker_control(assignment.output, run, copied),
        multiple=spec.sequence_parallel,
        stacks=storage.join(assignment.output, "stacks"),
        copies=True,
        rehearsal=partial(rehearse, spec, assignment.vocabulary, run),
    )
    groups = worker_groups(assignment)
    workers_at_end = groups[-1]["workers"] if groups else number
    report |= {"steps": spec.steps, "workers": workers_at_end, "groups": groups, "run": run.id}
    report["seconds"] = time.monotonic() - began
    report |= {"mixture": dict(spec.mixture), "epochs": epochs}
    return _publish_stage(original, assignment, report)


def _begin(assignment: Assignment) -> None:
    """From here on the output is in the making: take away its manifest, and what killed uploads have left; record a
    branch, and set aside what it leaves behind."""
    assignment.run.check_output()
    storage.delete(storage.join(assignment.output, MANIFEST))
    notice.delete_notices(catalog.checkpoints_folder(assignment.output), notice.ACTIONS)
    if assignment.resume is None:
        storage.delete(catalog.checkpoints_folder(assignment.output))
    elif assignment.begins_branch:
        why = f"the run {assignment.run.id} goes on from {assignment.resume.uri}"
        catalog.set_aside(assignment.output, assignment.resume.step, why)
        branch.log_branch(assignment.run, assignment.branch or {})


def _publish_stage(original: TrainSpecification, assignment: Assignment, report: dict[str, Any]) -> Manifest:
    """Write the stage's manifest, with the specification as it was given, then register the model if asked to: a
    registry that is away takes nothing from a stage that is finished. Raises TrackingError when it refuses."""
    spec, run = assignment.spec, assignment.run
    uri = storage.join(assignment.output, MODEL_FOLDER)
    files = _entries(assignment.output, MODEL_FOLDER)
    if spec.lora is not None:
        files += _entries(assignment.output, ADAPTER_FOLDER)
        report["adapter"] = ADAPTER_FOLDER
    others = [spec.locate(held) for held in spec.held_out.values()]
    others += [spec.locate(original.mixture_of.stage)] if original.mixture_of else []
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=original.model_dump(mode="json"),
        report={**report, "model": MODEL_FOLDER},
        inputs=assignment.inputs | fingerprints(others),
    )
    run.check_output()
    manifest.write(assignment.output)
    if spec.register_as:
        source = registry.copy_to_register(uri)
        registered = run.register(spec.register_as, source, provenance.lineage(uri), spec.alias)
        if registered is not None:
            manifest = manifest.model_copy(update={"report": manifest.report | {"model_uri": registered}})
            manifest.write(assignment.output)
    return manifest


def _entries(output: str, folder: str) -> list[FileEntry]:
    """The files of a published folder of the output, its manifest among them."""
    uri = storage.join(output, folder)
    files = [entry.model_copy(update={"path": f"{folder}/{entry.path}"}) for entry in Manifest.read(uri).files]
    return [*files, FileEntry.from_bytes(f"{folder}/{MANIFEST}", storage.read_bytes(storage.join(uri, MANIFEST)))]
