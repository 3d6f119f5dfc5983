"""Whether two trainings are one: what decides their steps is equal, wherever it is kept.

Data, tokenizers and starting points are compared by their content (fingerprints), not by their names: storage may move.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from calumma.platform.specification import JobSpecification
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.assignment import Checkpoint
from calumma.platform.training.specification import Resumable

# What may differ between two runs that continue each other: nothing here changes a step that was already taken.
_FREE_TO_CHANGE = {
    "tracking", "resources", "run_name", "steps", "checkpoint_every", "checkpoint_minutes", "log_every", "held_out",
    "samples", "register_as", "alias", "checkpoint_activations", "compile", "data", "max_epochs", "zero_stage",
    "offload", "held_out_every", "samples_every", "storage", "output", "publish", "mixture_of", "rows_per_pass",
    "evaluation", "overlap_communication", "sequence_parallel",
}  # fmt: skip
_LOCATIONS = ("text_tokenizer", "image_tokenizer", "documents", "mixture", "initial")


def made_by(spec: Resumable, inputs: Mapping[str, str]) -> Callable[[Manifest], bool]:
    """Whether a checkpoint was made by the same training: equal settings that matter, on equal data."""

    def accept(manifest: Manifest) -> bool:
        return not changes(manifest, spec, inputs) and int(manifest.report["step"]) <= spec.steps

    return accept


def changes(manifest: Manifest, spec: Resumable, inputs: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Field -> what it was when a checkpoint was made, and what it is: of those that must not change in a training."""
    try:
        made_with: JobSpecification | None = type(spec).model_validate(manifest.specification)
    except ValidationError:  # another job's, or an earlier version's
        made_with = None
    was = _settings(made_with.model_dump(mode="json") if made_with else manifest.specification, manifest.inputs)
    now = _settings(spec.model_dump(mode="json"), inputs)
    if now.get("resume") is None:  # any branch whose settings these are
        was.pop("resume", None)
    return {
        key: (was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    }


def is_allowed(field: str, allow: Iterable[str]) -> bool:
    """Whether `allow` names a field: as it is, by its section, or by its own name within that."""
    return bool({field, field.partition(".")[0], field.rpartition(".")[2]} & set(allow))


def difference(checkpoint: Checkpoint, spec: Resumable, inputs: Mapping[str, str]) -> str:
    """Why a specification does not go on with a checkpoint that `made_by` refuses."""
    manifest = checkpoint.manifest
    found = changes(manifest, spec, inputs)
    if list(found) == ["steps"]:
        was, now = found["steps"]
        return (
            f"`steps` was {was} and is {now}, and without schedule.total_steps the decay is laid out "
            "over them, so that is another training"
        )
    if not found:
        return f"it is to end after step {spec.steps}"
    if all(field in _LOCATIONS for field in found) and (data := _changed_content(manifest, spec, inputs)):
        return f"other data or tokenizers ({', '.join(data)})"
    return f"other settings ({', '.join(found)})"


def _settings(specification: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    """Field -> value of what decides a training's steps; sections by the fields in them, locations by what is there."""
    contents = {_plain(uri): mark for uri, mark in inputs.items() if mark}

    def content(location: str) -> str:
        place = _plain(_located(specification, location))
        return contents.get(place) or contents.get(f"{place}/model") or place

    kept: dict[str, Any] = {}
    for key, value in specification.items():
        if key in _FREE_TO_CHANGE or value is None:  # None: as before there was such a field
            continue
        if key == "mixture":
            named = sorted((_plain(_located(specification, uri)), uri) for uri in value)
            kept[key] = [[content(uri), float(value[uri])] for _, uri in named]
        elif key == "documents":
            kept[key] = [content(uri) for uri in value]
        elif key == "initial" and value.startswith("models:"):
            kept[key] = value
        elif key in _LOCATIONS:
            kept[key] = content(value)
        elif isinstance(value, dict) and key not in ("model", "resume"):
            kept |= {f"{key}.{name}": inner for name, inner in value.items() if inner is not None}
        else:
            kept[key] = value
    if (specification.get("schedule") or {}).get("total_steps") is None:
        kept["steps"] = specification.get("steps")  # the decay was laid out over them
    # What the fields do not lead to, say the model behind an alias.
    known = {value for field in ("mixture", "documents") for value in _flat(kept.get(field, []))}
    known |= {str(kept.get(field)) for field in _LOCATIONS}
    if unknown := sorted(set(contents.values()) - known):
        kept["initial"] = [kept.get("initial"), unknown]
    return kept


def _changed_content(manifest: Manifest, spec: Resumable, inputs: Mapping[str, str]) -> list[str]:
    """Locations with another content than then, where nothing else has changed but that."""
    was, now = ({_plain(uri): mark for uri, mark in each.items()} for each in (manifest.inputs, inputs))
    if was.keys() != now.keys() or _weights(manifest.specification) != _weights(spec.model_dump(mode="json")):
        return []
    return sorted(uri for uri in was if was[uri] != now[uri])


def _weights(specification: Mapping[str, Any]) -> dict[str, float]:
    given: dict[str, float] = specification.get("mixture") or {}
    return {_plain(_located(specification, uri)): float(weight) for uri, weight in given.items()}


def _located(specification: Mapping[str, Any], location: str) -> str:
    if "://" in location or location.startswith("/"):
        return location
    return f"{str(specification.get('storage', '')).rstrip('/')}/{location}"


def _plain(uri: str) -> str:
    """One spelling of a location."""
    return uri.rstrip("/") if "://" in uri else posixpath.normpath(uri)


def _flat(values: Any) -> list[str]:
    return [str(value[0]) if isinstance(value, list) else str(value) for value in values]
