"""Training of the VQ image tokenizer from the driver: check, start the workers, publish.

OUTPUT/config.json, model.safetensors, manifest.json (last)
OUTPUT.training/checkpoints/...   as those of a stage (checkpoints/), one file each: every worker has the whole state
"""

from __future__ import annotations

import logging

from calumma.platform import specification, storage
from calumma.platform.cluster import capacity
from calumma.platform.cluster.progress import Progress
from calumma.platform.shards.documents import curated_manifest
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import FileEntry, Manifest
from calumma.platform.tokenizing.text_tokenizer import check_output
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import ImageAssignment
from calumma.platform.training.checkpoints import catalog, identity
from calumma.platform.training.group import notice
from calumma.platform.training.group.chart import worker_groups, worker_range
from calumma.platform.training.group.control import worker_control
from calumma.platform.training.group.fit import fit
from calumma.platform.training.images import loop
from calumma.platform.training.images.data import load_weight_function
from calumma.platform.training.images.loop import KIND
from calumma.platform.training.images.objective import load_perceptual_loss
from calumma.platform.training.specification import ImageTokenizerSpecification

logger = logging.getLogger(__name__)


def train_image_tokenizer(spec: ImageTokenizerSpecification, run: Run, progress: Progress) -> Manifest:
    """Train the image tokenizer to its last step, going on from its newest checkpoint, and publish it.

    Raises SpecificationError before anything starts, TrainingFailed, StorageError.
    """
    original, spec = spec, specification.with_absolute_storage(spec)
    number = capacity.require_workers(spec.resources)
    read_from = [spec.locate(uri) for uri in [*spec.documents, *spec.held_out]]
    for uri in read_from:
        curated_manifest(uri)
    load_weight_function(spec)
    load_perceptual_loss(spec)
    output = spec.locate(spec.output)
    check_output(spec, output, read_from, KIND)
    assignment = prepare(spec, run)
    report = fit(
        loop.train,
        {"assignment": assignment},
        workers=worker_range(spec, number),
        resources=spec.resources,
        name=spec.job,
        run=run,
        steps=spec.steps,
        progress=progress,
        control=worker_control(assignment.output, run),
        stacks=storage.join(assignment.output, "stacks"),
    )
    files = [FileEntry.model_validate(entry) for entry in report.pop("files")]
    manifest = Manifest(
        kind=KIND,
        files=files,
        specification=original.model_dump(mode="json"),
        report={**report, "groups": worker_groups(assignment), "run": run.id},
        inputs=fingerprints(read_from),
    )
    run.check_output()
    manifest.write(output)
    return manifest


def prepare(spec: ImageTokenizerSpecification, run: Run) -> ImageAssignment:
    """What the workers share. Checkpoints of another training are discarded where that came to its end.

    Raises SpecificationError where it did not.
    """
    place, inputs = spec.training, fingerprints([spec.locate(uri) for uri in spec.documents])
    resume = catalog.newest(place, identity.made_by(spec, inputs))
    if resume is None and (other := catalog.newest(place)) is not None:
        folder, last = catalog.checkpoints_folder(place), int(other.manifest.specification.get("steps", 0))
        why = identity.difference(other, spec, inputs)
        if other.step < last:
            raise SpecificationError(
                f"output: {folder} has checkpoints of another training, stopped after step {other.step} of {last}, "
                f"which this one cannot go on with: {why}. Give another `output`, or run with --force, which discards "
                "them"
            )
        logger.info("%s has the checkpoints of a finished training with %s: they are discarded", folder, why)
    run.check_output()
    notice.delete_notices(catalog.checkpoints_folder(place), notice.ACTIONS)
    if resume is None:
        storage.delete(catalog.checkpoints_folder(place))
    return ImageAssignment(spec, run, place, inputs, resume)
