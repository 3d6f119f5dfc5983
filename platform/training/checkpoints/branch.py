"""Branches: a training goes on from a checkpoint with some settings changed, and says so; nothing is discarded.

`resume: {from, allow}` of a specification leads to the checkpoint (the branch's origin); what differs beyond `allow` is
refused by name. Once the branch has checkpoints of its own, it goes on from those.
"""

from __future__ import annotations

import re
from typing import Any

from calumma.platform import storage
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest, ManifestError
from calumma.platform.tracking.run import Run
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.checkpoints import catalog, identity
from calumma.platform.training.specification import TrainSpecification

_RUN_ID = re.compile(r"[0-9a-f]{32}")


def find_origin(spec: TrainSpecification, inputs: dict[str, str], run: Run) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint that `resume.from` names, and the branch as it is recorded. Raises SpecificationError."""
    assert spec.resume is not None
    origin = _named(spec, spec.resume.start, run)
    found = identity.changes(origin.manifest, spec, inputs)
    found.pop("resume", None)
    refused = [field for field in found if not identity.is_allowed(field, spec.resume.allow)]
    if refused:
        raise SpecificationError(
            f"resume.allow: {origin.uri} was made with other settings than these: {_told(found, refused)}. Set them "
            f"back, or allow the change: resume.allow: [{', '.join([*spec.resume.allow, *refused])}]"
        )
    if origin.step >= spec.steps:
        raise SpecificationError(
            f"resume.from: {origin.uri} is after step {origin.step} and `steps` is {spec.steps}: nothing is left to do"
        )
    changed = {field: {"was": was, "is": now} for field, (was, now) in found.items()}
    record = {"from": origin.uri, "step": origin.step, "of_run": origin.manifest.report.get("run"), "changed": changed}
    return origin, record


def log_branch(run: Run, record: dict[str, Any]) -> None:
    """Tags of the run, and what was changed as an artifact."""
    changed = ", ".join(f"{name}: {value['was']} -> {value['is']}" for name, value in record["changed"].items())
    run.log_tags(
        {
            "calumma.branch.from": record["from"],
            "calumma.branch.step": str(record["step"]),
            "calumma.branch.of_run": str(record["of_run"]),
            "calumma.branch.changed": changed or "nothing",
        }
    )
    run.log_dict(record, "branch.json")


def checkpoint_at(uri: str) -> Checkpoint | None:
    """The checkpoint in this very folder, its files all there at their size; None where there is none. Raises
    SpecificationError when it is not whole."""
    manifest = Manifest.find(uri)
    if manifest is None or manifest.kind != catalog.KIND:
        return None
    try:
        manifest.verify(uri)
    except ManifestError as error:
        raise SpecificationError(f"the checkpoint {uri} is not whole: {error}. Restore it, or name another") from error
    return Checkpoint(uri.rstrip("/"), manifest)


def _named(spec: TrainSpecification, start: int | str, run: Run) -> Checkpoint:
    output = spec.locate(spec.output)
    if isinstance(start, int) or (start.isdigit() and not _RUN_ID.fullmatch(start)):
        steps = catalog.published_steps(output)
        if int(start) not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise SpecificationError(
                f"resume.from: {catalog.checkpoints_folder(output)} has none after step {start}; there are: {there}"
            )
        places = [catalog.checkpoint_uri(output, int(start))]
    elif _RUN_ID.fullmatch(start):
        places = _of_run(start, run)
    else:
        places = [spec.locate(start)]
    for place in places:
        found = checkpoint_at(place) or (None if _RUN_ID.fullmatch(str(start)) else catalog.newest(place))
        if found is not None:
            return found
    raise SpecificationError(
        f"resume.from: there is no checkpoint at {places[0]}" if places else f"resume.from: the run {start} has none"
    )


def _of_run(identifier: str, run: Run) -> list[str]:
    """Where the checkpoints of an MLflow run are, newest first."""
    from mlflow.exceptions import MlflowException

    try:
        experiment = run.client.get_run(identifier).info.experiment_id
        models = run.client.search_logged_models([experiment], filter_string=f"source_run_id = '{identifier}'")
    except MlflowException as error:
        raise SpecificationError(
            f"resume.from: MLflow at {run.uri} has no run {identifier}: {error.message}"
        ) from error
    found = [
        (int(model.tags["calumma.step"]), model.tags["calumma.uri"]) for model in models if "calumma.uri" in model.tags
    ]
    return [uri for _, uri in sorted(found, reverse=True) if storage.exists(storage.join(uri, storage.MANIFEST))]


def _told(found: dict[str, tuple[Any, Any]], fields: list[str]) -> str:
    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 60 else f"{text[:57]}…"

    return "; ".join(f"{field} was {short(found[field][0])} and is {short(found[field][1])}" for field in fields)
