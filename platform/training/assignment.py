"""What the driver of a training has settled, the same for all workers, and the checkpoint that it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from calumma.model.config import ModelConfig
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.division import Division
from calumma.platform.tracking.run import Run
from calumma.platform.training.sections import Preference
from calumma.platform.training.specification import (
    FinetuneSpecification,
    ImageTokenizerSpecification,
    TrainSpecification,
)


@dataclass(frozen=True)
class Checkpoint:
    uri: str
    manifest: Manifest

    @property
    def step(self) -> int:
        """Steps of its own stage that were taken."""
        return int(self.manifest.report["step"])

    @property
    def schedule_step(self) -> int:
        """Steps that were taken over all stages of its schedule."""
        return int(self.manifest.report["schedule_step"])

    @property
    def tokens(self) -> dict[str, float]:
        """Trained tokens by modality, of its own stage."""
        return dict(self.manifest.report["tokens"])

    @property
    def files(self) -> str:
        """The folder that DeepSpeed knows as the checkpoint's."""
        return storage.join(self.uri, self.manifest.report.get("folder", ""))


@dataclass(frozen=True)
class Assignment:
    """What the driver has settled, the same for all workers. URIs are absolute."""

    spec: TrainSpecification
    config: ModelConfig
    vocabulary: Vocabulary
    run: Run
    output: str
    inputs: dict[str, str]
    """What the training data and the starting point are: directory -> fingerprint."""
    initial: str | None
    """Model directory whose weights are the starting point; none: fresh weights."""
    continued: Checkpoint | None
    """Checkpoint of an earlier stage whose optimizer and schedule go on here."""
    resume: Checkpoint | None
    """Checkpoint of this stage, or the origin of its branch."""
    origin: Checkpoint | None = None
    """Where this branch leaves another training: gone on from until there is a checkpoint of its own."""
    branch: dict[str, Any] | None = None
    """What is recorded of it: from where, of which run, what was changed."""
    initial_checkpoint: Checkpoint | None = None
    """Checkpoint whose weights are the starting point, in place of `initial`."""
    epochs_a_step: dict[str, float] = field(default_factory=dict)
    """Source -> the part of it that a step passes through."""
    division: Division | None = None
    """How workers divide a global batch; none before the order of the data is known: a pass a micro-batch then."""

    @property
    def start_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to start from."""
        return self.resume or self.continued

    @property
    def drops(self) -> bool:
        """Whether something is drawn in a forward pass."""
        return self.config.dropout > 0 or (self.spec.lora is not None and self.spec.lora.dropout > 0)

    @property
    def preference(self) -> Preference | None:
        """How it learns from pairs, where it does."""
        return self.spec.preference if isinstance(self.spec, FinetuneSpecification) else None

    @property
    def whole_passes(self) -> bool:
        """Whether passes are the same on any number of workers: what is dropped belongs to one, and both sides of a
        pair are in one."""
        return self.drops or self.preference is not None

    @property
    def begins_branch(self) -> bool:
        """Whether it starts at the branch's origin."""
        return self.origin is not None and self.resume is not None and self.resume.uri == self.origin.uri

    @property
    def offset(self) -> int:
        """Steps of the schedule that earlier stages have taken."""
        return self.continued.schedule_step if self.continued else 0

    @property
    def first_step(self) -> int:
        return self.resume.step if self.resume else 0

    @property
    def total_steps(self) -> int:
        """Length of the whole schedule."""
        return self.spec.schedule.total_steps or self.offset + self.spec.steps


@dataclass(frozen=True)
class ImageAssignment:
    """What the driver has settled, the same for all workers. URIs are absolute."""

    spec: ImageTokenizerSpecification
    run: Run
    output: str
    """Where checkpoints are, and whatever else training leaves."""
    inputs: dict[str, str]
    resume: Checkpoint | None

    @property
    def first_step(self) -> int:
        return self.resume.step if self.resume else 0
