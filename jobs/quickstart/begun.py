"""What of an earlier, unfinished or outdated run of a step is in the way of the next."""

from __future__ import annotations

from collections.abc import Mapping

from calumma.platform import storage
from calumma.platform.cluster import runner
from calumma.platform.specification import JobSpecification
from calumma.platform.storage.manifest import Manifest, json_digest
from calumma.platform.training.specification import ImageTokenizerSpecification, TrainSpecification


def begin(spec: JobSpecification, root: str, made: Mapping[str, Manifest]) -> None:
    """Before a step is run: delete a training's checkpoints unless it was begun by an equal recipe after equal steps
    (`made`) and did not end; of another step its manifest, for its parts stand or fall by themselves, and killed among
    them it must not be found whole. Raises StorageError."""
    if not isinstance(spec, TrainSpecification | ImageTokenizerSpecification):
        storage.delete(storage.join(spec.output_uri, storage.MANIFEST))
        return
    place = storage.join(root, "begun", f"{spec.run_name or spec.job}.json")
    values = spec.model_dump(mode="json", exclude={"tracking", "resources"})
    key = json_digest([values, {name: manifest.model_dump(mode="json") for name, manifest in made.items()}])
    try:
        begun = storage.read_bytes(place).decode()
    except storage.NotFound:
        begun = ""
    if begun != key or Manifest.find(spec.output_uri) is not None:
        runner.delete_result(spec)
    storage.write_bytes(place, key.encode())
