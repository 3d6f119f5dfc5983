"""What the training of a stage and of an image tokenizer may be asked."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig, ModelConfig
from calumma.platform.specification import JobSpecification
from calumma.platform.streaming.specification import MixtureSpecification
from calumma.platform.training.sections import (
    EarlyStopping,
    Faults,
    ImageAugmentation,
    ImageOptimizer,
    Lora,
    Offload,
    Optimizer,
    Preference,
    Resume,
    Schedule,
    StageEvaluation,
)


class ImageTokenizerSpecification(JobSpecification):
    """Trains the VQ image tokenizer under Ray Train; writes config.json, model.safetensors and a manifest."""

    job: Literal["train_image_tokenizer"] = "train_image_tokenizer"
    documents: list[str] = Field(min_length=1, description="curated directories whose images it learns from")
    held_out: list[str] = Field([], description="documents whose images measure the reconstruction error")
    output: str = Field("tokenizers/image", description="folder of the tokenizer")
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    steps: int = Field(ge=1, description="optimizer steps")
    batch: int = Field(ge=1, description="images a step, whatever the number of workers")
    learning_rate: float = Field(1e-3, gt=0, description="its peak: a short warm-up, then a cosine")
    optimizer: ImageOptimizer = ImageOptimizer()
    schedule: Schedule | None = Field(
        None, description="of the learning rate; null: a cosine to 0.02 of it after a warm-up of 100 steps or a tenth"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the networks' passes; codes, losses and weights are float32 in both"
    )
    augmentation: ImageAugmentation = ImageAugmentation()
    resolutions: list[int] = Field(
        [], description="sizes of which each step draws one, so that the tokenizer knows more than `model.resolution`"
    )
    commitment: float = Field(0.25, ge=0, description="weight of the commitment loss")
    loss: ImageLossConfig = ImageLossConfig()
    sampling_weight: str | None = Field(
        None,
        description="package.module:function, which gives an image (PIL, RGB) the weight it is drawn with; say 2 where "
        "it finds a face (paper section 2.1). None: all alike",
    )
    memory_gib: float = Field(
        2.0, gt=0, description="decoded images that all workers together hold; of more, a random sample is trained on"
    )
    stream: bool = Field(
        False, description="read images while training goes on, each once a pass, in place of holding them in memory"
    )
    stream_window: int = Field(4096, ge=1, description="encoded images that are held and shuffled together by `stream`")
    faults: Faults = Faults()
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="minutes after which there is a checkpoint, too, whatever the number of steps"
    )
    log_every: int | None = Field(None, ge=1, description="null: after every fiftieth of the steps")
    held_out_every: int | None = Field(
        None, ge=1, description="steps between two reconstructions of held-out images; null: only at the end"
    )

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        if not self.model.decoder:
            raise ValueError("model.decoder must be true: the decoder is trained with the encoder")
        if self.model.resolution < self.loss.smallest:
            raise ValueError(
                f"these losses need images of {self.loss.smallest} pixels, model.resolution is "
                f"{self.model.resolution}: set loss.discriminator_layers lower, or leave the adversarial or the "
                "perceptual loss out"
            )
        step = self.model.downsampling
        for size in self.resolutions:
            if size % step or not max(step, self.loss.smallest) <= size <= self.model.resolution:
                raise ValueError(
                    f"resolutions: {size} must be a multiple of {step} from {max(step, self.loss.smallest)} to "
                    f"model.resolution, {self.model.resolution}"
                )
        if self.stream and self.sampling_weight is not None:
            raise ValueError("sampling_weight: images are drawn by weight from memory alone; leave `stream` out")
        if self.batch < self.resources.max_workers:
            raise ValueError(
                f"batch: {self.batch} images cannot be shared by {self.resources.max_workers} workers "
                "(resources.workers)"
            )
        return self

    @property
    def training(self) -> str:
        """The folder of checkpoints and whatever else is not the tokenizer: beside the output, which others copy."""
        return f"{self.locate(self.output).rstrip('/')}.training"

    @property
    def checkpoints(self) -> str:
        return f"{self.training}/checkpoints"


class TrainSpecification(MixtureSpecification):
    """One training stage on packed token shards; writes checkpoints and a model directory."""

    held_out: dict[str, str] = Field({}, description="name -> token shards whose loss is measured, at the end at least")
    held_out_every: int | None = Field(
        None,
        ge=1,
        description="steps between two measurements, and one before the first step of what has an `initial`; null: "
        "only at the end",
    )
    evaluation: StageEvaluation | None = Field(None, description="tasks that are answered while it trains; null: none")
    early_stopping: EarlyStopping | None = Field(None, description="by the held-out losses; null: all steps are taken")
    text_tokenizer: str = Field(
        "tokenizers/text", description="folder of a trained one, or a model directory: that of the token shards"
    )
    image_tokenizer: str = Field(
        "tokenizers/image", description="folder of a trained one, or `image_tokenizer` of a model directory"
    )
    initial: str | None = Field(
        None,
        description="what to start from: output of an earlier stage, one of its checkpoints "
        "(OUTPUT/checkpoints/step-…), a model directory, or models:/name@alias",
    )
    resume: Resume | None = None
    continue_schedule: bool = Field(False, description="go on with the earlier stage's optimizer and step count")
    model: ModelConfig | None = Field(
        None, description="architecture, or {preset: name} and what differs from it; required without `initial`"
    )
    image_embedding: Literal["random", "codebook"] = Field(
        "random",
        description="what the embedding's rows of image tokens begin as in a model from scratch; codebook: the image "
        "tokenizer's own vectors, turned into the model's width, so that codes that look alike begin alike",
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides the model's")
    mask_documents: bool | None = Field(
        None,
        description="attend within a document only, so that each is learned as if it stood alone; overrides the "
        "model's",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    z_loss: float = Field(1e-5, ge=0, description="weight of log(Z)^2, which keeps logits small")
    image_loss_weight: float = Field(
        1.0,
        ge=0,
        description="what an image token counts in the loss beside a text token, which counts 1; images have many, of "
        "which much cannot be foretold, so that less than 1 has words learned sooner. Reported losses are without it",
    )
    trainable: str | list[str] | None = Field(
        None,
        description="`all`, `image_head` (the output rows of image ids), `image_rows` (all rows that an extended text "
        "model got: of image ids, begin and end, in embedding and output), names of parameters with * and ?, or a list "
        "of these. null: all, or with `lora` only its adapters",
    )
    lora: Lora | None = None
    faults: Faults = Faults()
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of the forward and backward pass; masters are float32"
    )
    float8: bool = Field(
        False,
        description="products of the blocks' linear layers in float8 (torchao, scaled by row): GPUs from H100 on",
    )
    gradient_reduction: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="in what gradients are summed over the workers; bfloat16 halves the traffic, and its sums are off "
        "by 1 % at 64 workers, up to 25 % at 1,024",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="what workers divide: 1 the optimizer, 2 gradients too, 3 weights too; by default 2 in bfloat16, 1 "
        "in float32",
    )
    rows_per_pass: int | None = Field(
        None,
        ge=1,
        description="sequences of a forward pass, at most: what a GPU has memory for; workers divide a global batch by "
        "sequences, or with dropout by whole passes. null: as many as were tokenized together",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="workers that share each row, for contexts too long for one: it must divide the model's heads and "
        "key-value heads, the context, and the number of workers (DeepSpeed-Ulysses)",
    )
    checkpoint_activations: bool | Literal["selective"] = Field(
        False,
        description="true: keep only each block's input and compute the rest again: slower, far less memory. "
        "selective: keep the results of matrix products and attention too: hardly slower, half the memory",
    )
    compile: bool | None = Field(
        None, description="torch.compile every block: minutes at the start, faster steps; null: where workers have GPUs"
    )
    overlap_communication: bool | None = Field(
        None,
        description="exchange gradients and weights while others are computed, for a second buffer; "
        "null: where workers have GPUs",
    )
    offload: Offload = Offload()
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed settings that override ours")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="minutes after which there is a checkpoint, too, whatever the number of steps"
    )
    log_every: int = Field(10, ge=1, description="steps between two reports of metrics")
    samples: list[str] = Field([], description="prompts whose answers are logged, as pictures, at the end at least")
    samples_every: int | None = Field(
        None, ge=1, description="steps between two sets of samples; null: only at the end"
    )
    publish: Literal["last", "best"] = Field(
        "last",
        description="whose weights the model directory has: the last step's, or those of the checkpoint with the "
        "lowest held-out loss",
    )
    register_as: str | None = Field(None, description="name in the MLflow model registry")
    alias: str | None = Field(None, description="alias given to the registered version, say `champion`")

    @model_validator(mode="before")
    @classmethod
    def _default_stage(cls, values: Any) -> Any:
        """In bfloat16 stage 1 keeps float32 gradients of all weights on every worker, stage 2 its part of them."""
        if isinstance(values, dict) and "zero_stage" not in values and values.get("precision") == "float32":
            optimizer = values.get("optimizer")
            whole = isinstance(optimizer, dict) and optimizer.get("kind") == "muon"
            return values | {"zero_stage": 0 if whole else 1}
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.resources.recovery.copy_every is not None and "nvme" in (self.offload.optimizer, self.offload.weights):
            raise ValueError(
                "`resources.recovery.copy_every` copies the state in memory, and with `offload: nvme` it is on a disk: "
                "leave one of the two away"
            )
        if self.precision == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "`zero_stage: 0` needs `precision: float32`: in bfloat16 DeepSpeed counts Adam's first step twice "
                "there. Leave it away for stage 2, which takes the same steps"
            )
        if self.optimizer.kind == "muon" and self.zero_stage != 0:
            raise ValueError(
                "`optimizer.kind: muon` takes whole matrices, which the optimizers of ZeRO 1 to 3 do not see: set "
                f"`zero_stage: 0` and `precision: float32`, given {self.zero_stage} and {self.precision}"
            )
        if self.optimizer.kind == "muon" and "optimizer" in self.deepspeed:
            raise ValueError(
                "`optimizer.kind: muon` and `deepspeed.optimizer` both choose an optimizer; leave one away"
            )
        if self.float8 and not self.resources.gpus_per_worker:
            raise ValueError("`float8` needs GPUs: set `resources.gpus_per_worker`")
        if self.float8 and self.precision != "bfloat16":
            raise ValueError("`float8` needs `precision: bfloat16`: what is not in float8 stays in that")
        if (self.model is None) == (self.initial is None):
            raise ValueError("give exactly one of `model` (train from scratch) and `initial` (start from a stage)")
        if self.image_embedding == "codebook" and self.initial is not None:
            raise ValueError("`image_embedding: codebook` needs `model`: with `initial` the embedding is there already")
        if self.continue_schedule and self.initial is None:
            raise ValueError("`continue_schedule` needs `initial`")
        if self.early_stopping and not (self.held_out and self.held_out_every):
            raise ValueError("`early_stopping` needs `held_out`, and `held_out_every` to measure it")
        if self.alias and not self.register_as:
            raise ValueError("`alias` needs `register_as`")
        if self.publish == "best" and (not self.held_out or self.held_out_every is None):
            raise ValueError("`publish: best` needs `held_out` and `held_out_every`: it compares held-out losses")
        if self.publish == "best" and self.held_out_every and self.checkpoint_every % self.held_out_every:
            raise ValueError(
                f"`publish: best` compares checkpoints by the loss of their own step: checkpoint_every "
                f"({self.checkpoint_every}) must be a multiple of held_out_every ({self.held_out_every})"
            )
        self._check_resume()
        self._check_sharing()
        if self.trainable is not None and not self.trainable:
            raise ValueError("`trainable` names nothing; leave it away to train everything")
        if self.lora and "all" in self.trainable_names:
            raise ValueError("`trainable: all` and `lora` contradict each other: adapters keep the weights frozen")
        if self.lora and self.lora.quantize and self.initial is None:
            raise ValueError("`lora.quantize` needs `initial`: there is nothing to keep in fresh weights")
        if self.lora and self.lora.quantize and self.float8:
            raise ValueError("`lora.quantize` and `float8` both say how the blocks' layers multiply; choose one")
        if self.offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError("`offload.optimizer` needs a `zero_stage` of 1, 2 or 3")
        if self.offload.weights != "none" and self.zero_stage != 3:
            raise ValueError(f"`offload.weights` needs `zero_stage: 3`, given {self.zero_stage}")
        return self

    def _check_resume(self) -> None:
        fields = type(self).model_fields
        known = {*fields, *Optimizer.model_fields, *Schedule.model_fields, *Faults.model_fields}
        for name in self.resume.allow if self.resume else []:
            if name.partition(".")[0] not in known:
                raise ValueError(f"resume.allow: there is no field {name!r}; there are {', '.join(sorted(fields))}")

    def _check_sharing(self) -> None:
        size, resources = self.sequence_parallel, self.resources
        for number in {resources.min_workers, resources.max_workers}:
            if number % size:
                raise ValueError(
                    f"sequence_parallel: {size} workers share each row, so resources.workers must be a multiple of "
                    f"{size}; given {number}"
                )

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return self.resources.gpus_per_worker > 0 if self.compile is None else self.compile

    @property
    def overlapped(self) -> bool:
        """Whether communication overlaps with computation."""
        return self.resources.gpus_per_worker > 0 if self.overlap_communication is None else self.overlap_communication

    @property
    def trainable_names(self) -> list[str]:
        """Sets and patterns of `trainable`, with its default settled."""
        if self.trainable is None:
            return [] if self.lora else ["all"]
        return [self.trainable] if isinstance(self.trainable, str) else self.trainable


class PretrainSpecification(TrainSpecification):
    """Pre-training on a mixture of packed token shards, stage 1 or 2 (paper section 2); writes a model directory."""

    job: Literal["pretrain"] = "pretrain"


class FinetuneSpecification(TrainSpecification):
    """Supervised fine-tuning on packed conversations, the loss on answers only (paper section 3); or, with
    `preference`, on pairs of answers."""

    job: Literal["finetune"] = "finetune"
    preference: Preference | None = Field(
        None, description="learn from pairs: token shards of the job tokenize_preferences"
    )
    schedule: Schedule = Schedule(kind="cosine", warmup_steps=0)
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.preference and self.sequence_parallel > 1:
            raise ValueError(
                "sequence_parallel: an answer's log-probability is of a whole row, and pairs are not learned from in "
                "parts of rows; leave it away"
            )
        if self.preference and self.image_loss_weight != 1:
            raise ValueError("image_loss_weight: of pairs it is `preference.image_weight` that says what images count")
        if self.preference and (self.rows_per_pass or 2) % 2:
            raise ValueError(
                f"rows_per_pass: pairs stand in two rows each, so it must be even; given {self.rows_per_pass}"
            )
        return self


Resumable = TrainSpecification | ImageTokenizerSpecification  # jobs that write checkpoints
