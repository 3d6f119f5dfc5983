"""Whether a result still stands: fingerprints of what a job read, compared with those its manifest records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from calumma.platform.specification import JobSpecification, Tracking
from calumma.platform.storage.manifest import Manifest, ManifestError, directory_fingerprint, json_digest

# Where and under what name a job ran does not change what it made.
_NOT_COMPARED = ("tracking", "resources", "run_name")


def fingerprints(uris: Iterable[str], tracking: Tracking | None = None) -> dict[str, str]:
    """URI -> what changes with what is there ("" when nothing is): the `inputs` of what is made from them.

    Of a published directory the sha256 of its manifest, of other files that of their listing. A `models:/` URI, looked
    up in the registry of `tracking`, changes when it leads elsewhere. Raises StorageError and TrackingError.
    """
    return {
        uri: _registered(uri, tracking) if uri.startswith("models:") else directory_fingerprint(uri) for uri in uris
    }


def _registered(uri: str, tracking: Tracking | None) -> str:
    from calumma.platform.tracking.registry import model_source

    source = model_source(uri, tracking)
    elsewhere = source.startswith(("mlflow-artifacts:", "runs:"))  # MLflow's own storage, where files never change
    return json_digest([source, "" if elsewhere else directory_fingerprint(source)])


def unchanged_result(uri_dir: str, specification: JobSpecification) -> Manifest | None:
    """The manifest, if an equal specification made the directory from inputs that are still the same; else None.

    Raises TrackingError when an input is a `models:/` URI that leads nowhere.
    """
    manifest = Manifest.find(uri_dir)
    if manifest is None:
        return None
    try:
        made_by = type(specification).model_validate(manifest.specification)
    except ValidationError:
        return None
    if _comparable_fields(made_by) != _comparable_fields(specification):
        return None
    return manifest if fingerprints(manifest.inputs, specification.tracking) == manifest.inputs else None


def _comparable_fields(specification: JobSpecification) -> dict[str, Any]:
    return specification.model_dump(mode="json", exclude=set(_NOT_COMPARED))


def reusable_result(uri_dir: str, specification: JobSpecification) -> Manifest | None:
    """The manifest of a directory that need not be made again: equal specification, equal inputs, files all there."""
    manifest = unchanged_result(uri_dir, specification)
    try:
        if manifest is not None:
            manifest.verify(uri_dir)
    except ManifestError:
        return None
    return manifest
