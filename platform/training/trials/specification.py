"""What an ablation and a ladder may be asked."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from calumma.model.config import ModelConfig
from calumma.platform.specification import JobSpecification, Section
from calumma.platform.training.forecast.shape import parameters
from calumma.platform.training.sections import Optimizer, Schedule


class TrialsSpecification(JobSpecification):
    """The part of a specification of many small trainings that all of them share."""

    mixture: dict[str, float] = Field(min_length=1, description="token shards -> weight")
    text_tokenizer: str = Field("tokenizers/text", description="folder of a trained one: that of the token shards")
    z_loss: float = Field(1e-5, ge=0, description="weight of log(Z)^2")
    optimizer: Optimizer = Optimizer()
    micro_batches: int = Field(1, ge=1, description="micro-batches a step")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward and backward pass; masters are float32"
    )

    @model_validator(mode="after")
    def _plain_optimizer(self) -> Self:
        if self.optimizer.kind != "adamw":
            raise ValueError(f"optimizer.kind: the `{self.job}` job trains with AdamW, given {self.optimizer.kind}")
        return self


class AblateSpecification(TrialsSpecification):
    """Trains the same small model with one stabilizer changed at a time, at rising learning rates and over seeds; draws
    the curves, and tells which instruments rose before the loss did."""

    job: Literal["ablate"] = "ablate"
    output: str = Field("ablation", description="folder of curves and figure")
    model: ModelConfig
    variants: dict[str, dict[str, Any]] = Field(
        min_length=1, description="name -> what differs: fields of `model`, and z_loss"
    )
    learning_rates: list[float] = Field(min_length=1, description="each variant is trained at each of them")
    seeds: int = Field(1, ge=1, description="trainings of each, with seeds `seed`, `seed` + 1, …")
    schedule: Schedule = Schedule(kind="cosine", warmup_steps=20)
    steps: int = Field(ge=1, description="of each training")
    log_every: int = Field(5, ge=1, description="steps between two points of a curve")
    spike: float = Field(
        0.5, gt=0, description="nats a token above the lowest loss so far from which a training has diverged"
    )
    alarm: float = Field(
        10.0, gt=1, description="times its largest value at the start from which an instrument has risen"
    )
    alarm_after: int = Field(100, ge=1, description="steps that are the start, which alarms are measured against")

    def variant(self, name: str) -> tuple[ModelConfig, float]:
        """Its architecture and z-loss."""
        given = dict(self.variants[name])
        z_loss = float(given.pop("z_loss", self.z_loss))
        return ModelConfig.model_validate(self.model.model_dump() | given), z_loss

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in self.variants:
            try:
                self.variant(name)
            except (TypeError, ValueError) as error:
                raise ValueError(f"variants.{name}: {error}") from error
        if low := [rate for rate in self.learning_rates if rate <= 0]:
            raise ValueError(f"learning_rates must be above 0, found {low}")
        return self


class LadderSize(Section):
    """One size of a ladder: `model` made wider by whole heads until it has about so many parameters."""

    parameters: float = Field(gt=0, description="of the whole model, about")
    steps: int = Field(ge=4, description="of its longest training; shorter ones are cut off it (`shares`)")
    layers: int | None = Field(None, ge=1, description="blocks; null: as many as `model` has")
    seeds: int = Field(1, ge=1, description="trainings, with seeds `seed`, `seed` + 1, …")


class RateSweep(Section):
    """Short trainings that find the learning rate, which the sizes then take over by muP."""

    learning_rates: list[float] = Field(min_length=3, description="which are tried, in rising order")
    steps: int = Field(ge=4, description="of each training")
    sizes: int = Field(
        1, ge=1, description="how many of the smallest sizes are swept: the first decides, the others show the transfer"
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        rates = self.learning_rates
        if rates[0] <= 0 or any(high <= low for low, high in pairwise(rates)):
            raise ValueError(f"learning_rates must be above 0 and rise, found {rates}")
        return self


class LadderSpecification(TrialsSpecification):
    """Trains a model at rising sizes, fits a scaling law to all but the largest, and holds its prediction for that
    against what was measured.

    Depth stays, width grows by whole heads, and the learning rate found at the first size is taken over by muP (arXiv
    2203.03466). Each size is one training at a constant rate; at each of `shares` a copy of it cools down to rate 0 and
    is measured (arXiv 2405.18392), so that one training gives several points of loss against parameters and tokens.
    """

    job: Literal["ladder"] = "ladder"
    output: str = Field("ladder", description="folder of results, figure and page")
    model: ModelConfig = Field(description="shape of the smallest size, the base that muP scales from")
    sizes: list[LadderSize] = Field(min_length=4, description="rising; the law is fitted to all but the last")
    sweep: RateSweep | None = Field(None, description="null: `optimizer.learning_rate` is the first size's")
    optimizer: Optimizer = Field(Optimizer(eps=1e-10), description="of the first size; the others' rates follow by muP")
    held_out: list[str] = Field([], description="token shards whose loss the law is about")
    hold_back: int = Field(
        0,
        ge=0,
        description="files of each source, its last, that are not trained on and whose loss it is about: documents as "
        "those that are",
    )
    held_out_micro_batches: int = Field(32, ge=1, description="of what is held out that are measured, evenly")
    shares: list[float] = Field(
        [0.25, 0.5, 1.0], min_length=2, description="of a size's steps at which a copy cools down; the last is 1"
    )
    cooldown: float = Field(0.2, gt=0, lt=1, description="share of the steps in which the rate falls to 0")
    warmup_steps: int = Field(20, ge=0, description="in which the rate rises from 0")
    bootstrap: int = Field(300, ge=10, description="resamples of documents and seeds, for the intervals")
    log_every: int = Field(10, ge=1, description="steps between two points of a training's curve")
    checkpoint_minutes: float = Field(5.0, gt=0, description="after which an unfinished training is written down")

    def shape(self, number: int, vocabulary_size: int) -> ModelConfig:
        """The model of size `number`: the width, in whole heads, whose parameters are nearest to those asked for."""
        asked, base = self.sizes[number], self.model
        layers, per_head = asked.layers or base.layers, base.width // base.heads
        kept = base.model_dump() | {"vocabulary_size": vocabulary_size, "layers": layers}
        nearest, best = base, float("inf")
        for groups in range(1, 4096):
            heads = groups * base.heads // base.kv_heads
            ffn = max(8, round(base.ffn_width * heads / base.heads / 8) * 8)
            wider = {"width": heads * per_head, "heads": heads, "kv_heads": groups, "ffn_width": ffn}
            shape = ModelConfig.model_validate(kept | wider)
            off = sum(parameters(shape).values()) - asked.parameters
            if abs(off) < best:
                nearest, best = shape, abs(off)
            if off > 0:
                break
        return nearest

    def ends(self, number: int) -> list[int]:
        """Steps after which size `number` is measured, rising."""
        return [max(1, round(share * self.sizes[number].steps)) for share in self.shares]

    def cooldown_start(self, end: int) -> int:
        return end - max(1, round(self.cooldown * end))

    @model_validator(mode="after")
    def _rising(self) -> Self:
        sizes = [size.parameters for size in self.sizes]
        if sorted(set(sizes)) != sizes:
            raise ValueError(f"sizes must rise in parameters, found {sizes}")
        if self.shares[-1] != 1 or sorted(set(self.shares)) != self.shares or self.shares[0] <= 0:
            raise ValueError(f"shares must rise to 1 from above 0, found {self.shares}")
        if self.sweep and self.sweep.sizes >= len(self.sizes):
            raise ValueError(
                f"sweep.sizes: the largest of {len(self.sizes)} sizes is not swept, given {self.sweep.sizes}"
            )
        if bool(self.held_out) == bool(self.hold_back):
            raise ValueError("give either `held_out`, token shards, or `hold_back`, files of the mixture's own")
        if self.model.own_head_size is not None or self.model.tied:
            raise ValueError("model: a ladder needs heads of width / heads, and an output of its own (not tied)")
        return self
