"""Sections of the specifications of trainings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from calumma.platform.evaluation.specification import EvaluationTask
from calumma.platform.specification import Section


class Faults(Section):
    """What becomes of a step whose loss or gradient is not finite, or whose loss is a spike. Recorded in MLflow."""

    action: Literal["skip", "roll_back"] = Field(
        "skip",
        description="skip: the weights stay as they are. roll_back: they return to the last checkpoint, and training "
        "goes on behind the bad data",
    )
    spike_factor: float | None = Field(
        None, gt=1, description="a loss above this times the running median is a spike; null: only non-finite ones are"
    )
    window: int = Field(64, ge=2, description="steps whose median it is; before that many there are no spikes")
    around: int = Field(0, ge=0, description="global batches that a roll-back leaves out behind the bad one")
    in_a_row: int = Field(
        3, ge=1, description="more bad steps than this without a good one (after a roll-back: a checkpoint) end the run"
    )


class Schedule(Section):
    """Linear warm-up, then decay to `final` x the peak over `total_steps` (default: the stage's own steps)."""

    kind: Literal["exponential", "cosine", "constant"] = Field("exponential", description="how the rate decays")
    warmup_steps: int = Field(4000, ge=0, description="steps in which it rises from 0")
    total_steps: int | None = Field(None, ge=1, description="the length of the whole schedule over all stages")
    final: float = Field(0.01, ge=0, le=1, description="share of the peak at the end")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.kind == "exponential" and self.final == 0:
            raise ValueError("final: an exponential decay never reaches 0; give a small share, say 0.001")
        return self


class _AdamWOrMuon(Section):
    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: matrices of the blocks, or an image tokenizer's convolutions, move by the orthogonal matrix "
        "nearest to their momentum, the rest by AdamW, at one learning rate; fewer steps, some more time each, which "
        "workers divide; a Transformer needs `zero_stage: 0` for it",
    )
    momentum: float | None = Field(
        None, ge=0, lt=1, description="Muon's: decay of its mean of gradients; null: 0.95, of an image tokenizer 0.9"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of a network's whole gradient")

    @model_validator(mode="after")
    def _of_muon(self) -> Self:
        if self.momentum is not None and self.kind != "muon":
            raise ValueError("`momentum` is Muon's: set `kind: muon`, or `beta1`, which is AdamW's")
        return self


class ImageOptimizer(_AdamWOrMuon):
    """AdamW, or Muon, of the image tokenizer; `learning_rate` stands beside it. A discriminator has AdamW."""

    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(1e-8, gt=0, description="added to the divisor")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled")


class ImageAugmentation(Section):
    """What a step sees of an image. None by default: the mirror image of a text or a digit is another."""

    mirror: float = Field(0.0, ge=0, le=1, description="chance that an image is mirrored")
    smallest_crop: float = Field(
        1.0, gt=0, le=1, description="a random square of at least this share of a side, brought to full size; 1: none"
    )


class Resume(Section):
    """A branch of a training: on from one of its checkpoints, with some settings changed. It is recorded in MLflow."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    start: int | str = Field(
        alias="from",
        description="a step of this output's checkpoints, a checkpoint's folder, another stage's output, or the id of "
        "an MLflow run: its newest",
    )
    allow: list[str] = Field(
        [], description="fields that may differ from what it was made with, say [learning_rate, faults, mixture]"
    )


class Optimizer(_AdamWOrMuon):
    """AdamW (paper section 2.3), or Muon."""

    learning_rate: float = Field(1e-4, gt=0, description="its peak")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(1e-5, gt=0, description="added to the divisor")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; of matrices, not of norms")


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): W + scale * up @ down with W frozen. They are written in PEFT's format
    beside the model in which they are merged into W."""

    rank: int = Field(8, ge=1, description="of each adapter")
    alpha: float = Field(16.0, gt=0, description="scale: an adapter counts alpha / rank")
    rank_stabilized: bool = Field(
        False, description="an adapter counts alpha / sqrt(rank): high ranks learn as fast as low ones (2312.03732)"
    )
    dora: bool = Field(False, description="a trained magnitude for every output channel (DoRA, arXiv 2402.09353)")
    dropout: float = Field(0.0, ge=0, lt=1, description="of an adapter's input, in training")
    quantize: Literal[4, 8] | None = Field(
        None,
        description="bits of the frozen linear layers of the blocks while adapters are trained on them (QLoRA, arXiv "
        "2305.14314; 4: NormalFloat, 8: whole numbers). null: they keep the training's precision",
    )
    targets: list[str] = Field(
        ["blocks.*"], min_length=1, description="names of linear layers with * and ?, say blocks.*.attention.*"
    )

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices counts."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class Offload(Section):
    """Where ZeRO keeps what the device has no room for: optimizer state and float32 masters; weights (stage 3)."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="place of optimizer state and float32 masters"
    )
    weights: Literal["none", "cpu", "nvme"] = Field("none", description="place of the weights")
    nvme_path: str | None = Field(None, description="folder on a fast local disk of every node")
    pin_memory: bool = Field(True, description="page-locked memory: faster copies, but it cannot be swapped")

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if "nvme" in (self.optimizer, self.weights) and self.nvme_path is None:
            raise ValueError("`nvme` needs `nvme_path`, a folder on a fast local disk that every node has")
        return self


class EarlyStopping(Section):
    """End a stage when the mean of its held-out losses falls no more, with the weights that had the lowest."""

    patience: int = Field(3, ge=1, description="measurements without a lower loss after which it ends")
    min_delta: float = Field(0.0, ge=0, description="a loss that is lower by less is not lower")


class StageEvaluation(Section):
    """Tasks of the job `evaluate`, answered by the model in training; their measures are metrics of the run."""

    tasks: list[EvaluationTask] = Field(min_length=1)
    judge_training: str | None = Field(
        None, description="curated images with captions as labels, for the classifier of drawn images"
    )
    every: int | None = Field(None, ge=1, description="steps between two evaluations; null: only at the end")
    batch: int = Field(32, ge=1, description="prompts answered at once")

    @model_validator(mode="after")
    def _judged(self) -> Self:
        drawing = [task.name for task in self.tasks if task.kind != "recognition"]
        if drawing and self.judge_training is None:
            raise ValueError(f"the tasks {', '.join(drawing)} draw, and `judge_training` is not given")
        return self


class Preference(Section):
    """Learning from pairs of a wanted and an unwanted answer, interleaved ones too: an answer's log-probability is the
    sum of its tokens', text and image codes, by their weights.

    dpo (arXiv 2305.18290): -log sigmoid(beta x margin), where the margin is how much more the log-probability of the
    chosen answer has grown over the reference, the model at the start, than the rejected one's. ipo (arXiv 2310.12036):
    (margin - 1 / (2 beta))^2, of means over tokens, as TRL has it. orpo (arXiv 2403.07691), which needs no reference:
    the chosen answer's loss, plus beta x -log sigmoid of the difference of their log-odds.
    """

    loss: Literal["dpo", "ipo", "orpo"] = Field("dpo", description="what is minimized")
    beta: float = Field(0.1, gt=0, description="how strongly a pair pulls; for orpo how much the odds count")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be the wrong way round; dpo")
    text_weight: float = Field(1.0, ge=0, description="of a text token in an answer's log-probability")
    image_weight: float = Field(1.0, ge=0, description="of an image code in it; images have many")
    chosen_weight: float = Field(
        0.0, ge=0, description="times the chosen answer's mean loss, added: keeps it likely; dpo and ipo"
    )

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.text_weight and not self.image_weight:
            raise ValueError("text_weight and image_weight are both 0: nothing would be learned")
        return self
