"""Job specifications: what a job does, as one typed YAML file. Everything is checked here, before Ray starts.

Inside a specification every location is a URI (`s3://...`), an absolute path, or a path below `storage`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from calumma.model.config import ImageLossConfig, ImageTokenizerConfig, ModelConfig


class SpecificationError(ValueError):
    """A specification that cannot run; the message names the field, what was given and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tracking(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; none: SQLite and local artifacts below ./mlflow")
    experiment: str = "calumma"
    project: str | None = Field(
        None, min_length=1, description="MLflow run below which those of all jobs with this project stand"
    )


class WorkerRange(Section):
    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Recovery(Section):
    """How training goes on when workers fail, hang, or nodes join and leave."""

    restarts: int = Field(
        3, ge=0, description="failures of workers without a new checkpoint in between, after which the run ends"
    )
    hang_seconds: float = Field(1800, gt=0, description="a worker without progress for so long is ended")
    resize_seconds: float = Field(60, gt=0, description="how often a range of workers looks for nodes that joined")
    stop_seconds: float = Field(
        120, gt=0, description="how long the checkpoint on SIGTERM, Ctrl-C or before a resize may take"
    )


class Retention(Section):
    """Which checkpoints of a stage stay in storage; one reason is enough."""

    last: int = Field(3, ge=1, description="the newest ones")
    every: int | None = Field(None, ge=1, description="those whose step is a multiple of it")
    best: int = Field(0, ge=0, description="those with the lowest loss")


class Resources(Section):
    """What the job asks of the cluster. A range of workers grows and shrinks with it while training runs."""

    workers: Annotated[int, Field(ge=0)] | WorkerRange = Field(
        1, description="0: in the job's own process, without a cluster (curate and tokenize; for tests and notebooks)"
    )
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    recovery: Recovery = Recovery()
    keep: Retention = Retention()

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers


IN_PROCESS = ("curate", "tokenize")  # jobs that need no cluster when resources.workers is 0


class JobSpecification(Section):
    job: str
    storage: str = Field(description="root URI or folder; relative locations are below it")
    tracking: Tracking = Tracking()
    resources: Resources = Resources()
    run_name: str | None = Field(None, description="name of the MLflow run; default: the job's name")
    seed: int = 0

    @model_validator(mode="after")
    def _workers(self) -> Self:
        if self.resources.workers == 0 and self.job not in IN_PROCESS:
            raise ValueError(
                f"resources.workers: 0, which is work without a cluster, is for {' and '.join(IN_PROCESS)}; "
                f"give {self.job} at least 1"
            )
        return self

    def locate(self, location: str) -> str:
        """The absolute URI or path of a location named in this specification."""
        if "://" in location or Path(location).is_absolute():
            return location
        return f"{self.storage.rstrip('/')}/{location}"


def last_part(location: str) -> str:
    """The name that a location ends in, of a path or a URI."""
    return location.rstrip("/").rpartition("/")[2]


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


class Source(Section):
    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    format: str = Field(description="the name of a format, or a reader of your own as package.module:function")
    location: str = Field(description="a file, or a prefix whose files are all read")
    images: str | None = Field(
        None,
        description="the folder of the images that files refer to; default: each file's own, or for pages the location",
    )
    options: dict[str, Any] = Field({}, description="options of the reader, such as {field: body}")

    @field_validator("format")
    @classmethod
    def _known(cls, format: str) -> str:
        from calumma.platform import sources  # only where a source is given: readers need Pillow and numpy

        sources.check(format, {})
        return format

    @field_validator("options")
    @classmethod
    def _understood(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from calumma.platform import sources

        if "format" in info.data:  # else the format is wrong already
            sources.check(info.data["format"], options)
        return options


class CurationStep(Section):
    """A step of the curation; a specification turns it on by naming it."""

    sources: list[str] | None = Field(None, min_length=1, description="the sources it applies to, by name; none: all")


class TextRules(CurationStep):
    """Lengths and languages of texts and pages. Of image-caption pairs the language only: lengths are CaptionRules'."""

    min_characters: int = Field(0, ge=0)
    max_characters: int | None = Field(None, ge=1)
    min_words: int = Field(0, ge=0)
    max_words: int | None = Field(None, ge=1)
    languages: list[str] = Field([], description="ISO 639-1 codes that are kept; none: all, and none is looked for")
    min_probability: float = Field(0.6, ge=0, le=1, description="that a text must reach in its language")


class ImageRules(CurationStep):
    """Sizes of images. A failing image takes its document with it, of a page (unless told otherwise) only itself."""

    min_side: int = Field(1, ge=1, description="pixels of the shorter side")
    max_side: int | None = Field(None, ge=1, description="pixels of the longer side")
    max_aspect: float | None = Field(None, ge=1, description="longer side by shorter side")
    pages: Literal["image", "document"] = Field("image", description="what a failing image of a page takes with it")


class CaptionRules(CurationStep):
    """Captions of image-caption pairs."""

    min_words: int = Field(1, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_letters: float = Field(0.0, ge=0, le=1, description="share of letters among all characters but white space")
    max_repetition: float = Field(1.0, ge=0, le=1, description="share of words that repeat an earlier one")
    boilerplate: bool = Field(True, description="drop file names, camera names, web addresses, `image 3 of 7`, …")
    patterns: list[str] = Field([], description="regular expressions; a caption in which one is found is dropped")

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class NameRules(CurationStep):
    """Which names (licenses, domains) are kept: those allowed, if any are given, and not denied."""

    allow: list[str] = []
    deny: list[str] = []
    deny_file: str | None = Field(None, description="location of a text file with one more denied name a line")
    unknown: Literal["keep", "drop"] = Field("keep", description="what becomes of documents that say none")


Personal = Literal["email", "phone", "ip", "credit_card", "iban"]


class ScrubRules(CurationStep):
    """What is replaced in texts and captions by a mark such as <EMAIL>."""

    personal: list[Personal] = Field(list(get_args(Personal)), description="kinds of personal data")
    secrets: bool | list[str] = Field(
        True, description="keys and tokens: by all detectors of a known form, or by these, as detect-secrets names them"
    )
    hooks: list[str] = Field([], description="package.module:function, each given a text and returning it scrubbed")


class Upsampling(Section):
    above: float = Field(description="documents of a higher score are repeated")
    times: float = Field(ge=1, description="copies of each; the fraction decides by the document's hash")


class Scorer(CurationStep):
    """A model or measure that gives images or documents a number to choose by."""

    factory: str = Field(
        description="package.module:function, called with `arguments` once in every actor; what it returns is called "
        "with lists (RGB images, or documents) and returns a number for each"
    )
    arguments: dict[str, Any] = {}
    of: Literal["images", "documents"] = "images"
    reduce: Literal["mean", "min", "max"] = Field("mean", description="the score of a document with several images")
    minimum: float | None = None
    maximum: float | None = None
    upsample: Upsampling | None = None
    batch: int = Field(32, ge=1, description="images or documents a call")
    resources: Resources = Resources()


class NearDuplicates(Section):
    """Texts that share most of their runs of words (MinHash)."""

    similarity: float = Field(0.8, gt=0, lt=1, description="Jaccard, of the sets of runs of words")
    words: int = Field(5, ge=1, description="length of a run")
    permutations: int = Field(128, ge=16, multiple_of=2, description="values of a signature")


class ImageDuplicates(Section):
    """Image-caption pairs whose images look alike (perceptual hash)."""

    distance: int = Field(4, ge=0, le=10, description="bits, of 64, that two hashes may differ in")


class DuplicateRules(CurationStep):
    """Of documents that are alike the first stays, by the order of sources in the specification, files, and places."""

    exact: bool = Field(True, description="equal but for case and white space, and equal images")
    near: NearDuplicates | None = None
    images: ImageDuplicates | None = None


class Decontamination(CurationStep):
    """Drops documents that contain parts of evaluation sets."""

    against: list[str] = Field(
        min_length=1, description="locations: curated directories, .jsonl or .json (every string in them), .txt (lines)"
    )
    ngram: int = Field(13, ge=2, description="words in a row that a document may not share with an evaluation set")
    shortest: int = Field(8, ge=2, description="evaluation texts of fewer words than `ngram` count down to this length")
    image_distance: int | None = Field(
        None, ge=0, le=16, description="bits, of 64, that perceptual hashes of images may differ in; none: texts only"
    )


class CurateSpecification(JobSpecification):
    """Raw files -> checked, ordered documents in Parquet shards, a manifest a source, a report of what was dropped."""

    job: Literal["curate"] = "curate"
    sources: list[Source] = Field(min_length=1)
    output: str = "curated"
    image_first: float = Field(0.5, ge=0, le=1, description="share of image-caption pairs whose image stands first")
    min_text: int = Field(1, ge=0, description="characters; plain-text documents below it are dropped")
    max_bad_share: float = Field(0.01, ge=0, le=1, description="the job fails when more input than this is unreadable")
    documents_per_shard: int = Field(1000, ge=1)
    licenses: NameRules | None = Field(None, description="names may hold wildcards, say `cc-by*`")
    domains: NameRules | None = Field(None, description="of the documents' URLs; a name covers its subdomains")
    images: ImageRules | None = None
    captions: CaptionRules | None = None
    texts: TextRules | None = None
    decontaminate: Decontamination | None = None
    scrub: ScrubRules | None = None
    duplicates: DuplicateRules | None = None
    scorers: dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")], Scorer] = Field({}, description="by name")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := _repeated(source.name for source in self.sources):
            raise ValueError(f"sources: the name {', '.join(twice)} is given more than once; names must differ")
        return self

    @model_validator(mode="after")
    def _known_sources(self) -> Self:
        known = [source.name for source in self.sources]
        for place, step in self._steps().items():
            if unknown := sorted(set(step.sources or ()) - set(known)):
                raise ValueError(
                    f"{place}.sources: there is no source {', '.join(unknown)}; sources are {', '.join(known)}"
                )
        return self

    def _steps(self) -> dict[str, CurationStep]:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        fields |= {f"scorers.{name}": scorer for name, scorer in self.scorers.items()}
        return {place: step for place, step in fields.items() if isinstance(step, CurationStep)}

    def only(self, names: Iterable[str]) -> Self:
        """The specification of some of its sources alone, without the steps that apply to none of them."""
        chosen = [source for source in self.sources if source.name in set(names)]

        def narrowed(step: Any) -> Any:
            if step.sources is None:
                return step
            left = [source.name for source in chosen if source.name in step.sources]
            return step.model_copy(update={"sources": left}) if left else None

        steps: dict[str, Any] = {place: narrowed(step) for place, step in self._steps().items() if "." not in place}
        scorers = {name: scorer for name, scorer in self.scorers.items() if narrowed(scorer)}
        steps["scorers"] = {name: narrowed(scorer) for name, scorer in scorers.items()}
        return self.model_copy(update={"sources": chosen, **steps})


class TextTokenizerSpecification(JobSpecification):
    """Trains the BPE model over curated documents; writes text_tokenizer.model, vocabulary.json and a manifest."""

    job: Literal["train_text_tokenizer"] = "train_text_tokenizer"
    documents: list[str] = Field(min_length=1)
    output: str = "tokenizers/text"
    vocabulary_size: int = Field(65536, ge=300, description="all ids: special, image codes, bytes, merges")
    image_codes: int = Field(8192, ge=2)
    max_characters: int = Field(100_000_000, ge=1000)


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


class ImageTokenizerSpecification(JobSpecification):
    """Trains the VQ image tokenizer under Ray Train; writes config.json, model.safetensors and a manifest."""

    job: Literal["train_image_tokenizer"] = "train_image_tokenizer"
    documents: list[str] = Field(min_length=1)
    held_out: list[str] = Field([], description="documents whose images measure the reconstruction error")
    output: str = "tokenizers/image"
    model: ImageTokenizerConfig = ImageTokenizerConfig()
    steps: int = Field(ge=1)
    batch: int = Field(ge=1, description="images a step, whatever the number of workers")
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0)
    loss: ImageLossConfig = ImageLossConfig()
    sampling_weight: str | None = Field(
        None,
        description="package.module:function, which gives an image (PIL, RGB) the weight it is drawn with; say 2 where "
        "it finds a face (paper section 2.1). None: all alike",
    )
    memory_gib: float = Field(
        2.0, gt=0, description="decoded images that all workers together hold; of more, a random sample is trained on"
    )
    faults: Faults = Faults()
    checkpoint_every: int = Field(1000, ge=1)
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


class TokenizeSpecification(JobSpecification):
    """Curated documents -> packed token shards. Each entry of `documents` becomes `output/<its last path part>`."""

    job: Literal["tokenize"] = "tokenize"
    documents: list[str] = Field(min_length=1)
    text_tokenizer: str = "tokenizers/text"
    image_tokenizer: str = "tokenizers/image"
    output: str = "tokens"
    context: int = Field(4096, ge=16)
    micro_batch: int = Field(1, ge=1, description="packed sequences a row group, the unit a worker reads")
    micro_batches_per_shard: int = Field(256, ge=1)
    window: int = Field(
        1000,
        ge=1,
        description="documents, about, that a task shuffles and packs together: more make fuller rows and shards, and "
        "a killed job has more to repeat",
    )
    image_batch: int = Field(
        16, ge=1, description="images coded at once; 16 of 512x512 need about 8 GB of the device's memory"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if twice := _repeated(last_part(location) for location in self.documents):
            raise ValueError(f"documents: several end in {', '.join(twice)}; their tokens would share a directory")
        return self


class Optimizer(Section):
    """AdamW (paper section 2.3)."""

    learning_rate: float = Field(1e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(1.0, gt=0)


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): W + alpha / rank * up @ down with W frozen; merged into W at the end."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    targets: list[str] = Field(
        ["blocks.*"], min_length=1, description="names of linear layers with * and ?, say blocks.*.attention.*"
    )


class Offload(Section):
    """Where ZeRO keeps what the device has no room for: optimizer state and float32 masters; weights (stage 3)."""

    optimizer: Literal["none", "cpu", "nvme"] = "none"
    weights: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = Field(None, description="folder on a fast local disk of every node")
    pin_memory: bool = Field(True, description="page-locked memory: faster copies, but it cannot be swapped")

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if "nvme" in (self.optimizer, self.weights) and self.nvme_path is None:
            raise ValueError("`nvme` needs `nvme_path`, a folder on a fast local disk that every node has")
        return self


class Schedule(Section):
    """Linear warm-up, then decay to `final` x the peak over `total_steps` (default: the stage's own steps)."""

    kind: Literal["exponential", "cosine", "constant"] = "exponential"
    warmup_steps: int = Field(4000, ge=0)
    total_steps: int | None = Field(None, ge=1, description="the length of the whole schedule over all stages")
    final: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.kind == "exponential" and self.final == 0:
            raise ValueError("final: an exponential decay never reaches 0; give a small share, say 0.001")
        return self


class MixtureOf(Section):
    """The mixture of an earlier stage, as part of this one's (paper section 2.2: at half its weight in stage 2)."""

    stage: str = Field(description="output of the earlier stage")
    share: float = Field(
        gt=0, le=1, description="of this stage's micro-batches; the rest is for the sources in mixture"
    )


class CopiesOfShards(Section):
    """A local cache of shards, shared by the workers of a machine."""

    directory: str
    gigabytes: float = Field(gt=0, description="what it may take; the copies not read for longest make room")


class Reading(Section):
    """How token shards are read."""

    verify: bool = Field(True, description="check every row group that is read against its digest")
    cache: CopiesOfShards | None = Field(None, description="keep copies of whole shards; none: read parts of them")


class TrainSpecification(JobSpecification):
    """One training stage on packed token shards; writes checkpoints and a model directory."""

    mixture: dict[str, float] = Field({}, description="token shards -> weight; weights need not add up to anything")
    mixture_of: MixtureOf | None = None
    max_epochs: float | None = Field(
        None, gt=0, description="passes through a source beyond which the stage is refused; none: a warning beyond 4"
    )
    data: Reading = Reading()
    held_out: dict[str, str] = Field({}, description="name -> token shards whose loss is measured, at the end at least")
    held_out_every: int | None = Field(None, ge=1, description="steps between two measurements; null: only at the end")
    text_tokenizer: str = "tokenizers/text"
    image_tokenizer: str = "tokenizers/image"
    output: str
    initial: str | None = Field(None, description="output of an earlier stage whose weights this one starts from")
    continue_schedule: bool = Field(False, description="go on with the earlier stage's optimizer and step count")
    model: ModelConfig | None = Field(
        None, description="architecture, or {preset: name} and what differs from it; required without `initial`"
    )
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides the model's")
    steps: int = Field(ge=1)
    micro_batches: int = Field(ge=1, description="micro-batches a global batch, whatever the number of workers")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    z_loss: float = Field(1e-5, ge=0)
    trainable: str | list[str] | None = Field(
        None,
        description="`all`, `image_head` (the output rows of image ids), names of parameters with * and ?, or a list "
        "of these. null: all, or with `lora` only its adapters",
    )
    lora: Lora | None = None
    faults: Faults = Faults()
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    checkpoint_activations: bool = Field(
        False, description="keep only each block's input and compute the rest again: slower, far less memory"
    )
    compile: bool = Field(False, description="torch.compile every block: minutes at the start, faster steps")
    offload: Offload = Offload()
    deepspeed: dict[str, Any] = Field({}, description="raw DeepSpeed settings that override ours")
    checkpoint_every: int = Field(1000, ge=1)
    log_every: int = Field(10, ge=1)
    samples: list[str] = Field([], description="prompts whose answers are logged, as pictures, at the end at least")
    samples_every: int | None = Field(
        None, ge=1, description="steps between two sets of samples; null: only at the end"
    )
    register_as: str | None = Field(None, description="name in the MLflow model registry")
    alias: str | None = Field(None, description="alias given to the registered version, say `champion`")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.model is None) == (self.initial is None):
            raise ValueError("give exactly one of `model` (train from scratch) and `initial` (start from a stage)")
        if self.continue_schedule and self.initial is None:
            raise ValueError("`continue_schedule` needs `initial`")
        if self.alias and not self.register_as:
            raise ValueError("`alias` needs `register_as`")
        bad = {k: v for k, v in self.mixture.items() if v <= 0}
        if bad:
            raise ValueError(f"mixture weights must be above 0, found {bad}")
        if not self.mixture and self.mixture_of is None:
            raise ValueError(
                "mixture: name at least one directory of token shards, or an earlier stage in `mixture_of`"
            )
        if self.mixture_of and bool(self.mixture) != (self.mixture_of.share < 1):
            given = f"{self.mixture_of.share:g}, and `mixture` names {len(self.mixture)} sources for the rest"
            raise ValueError(f"mixture_of.share is {given}; a share below 1 needs some, a share of 1 none")
        if self.trainable is not None and not self.trainable:
            raise ValueError("`trainable` names nothing; leave it away to train everything")
        if self.lora and "all" in self.trainable_names:
            raise ValueError("`trainable: all` and `lora` contradict each other: adapters keep the weights frozen")
        if self.offload.optimizer != "none" and self.zero_stage == 0:
            raise ValueError("`offload.optimizer` needs a `zero_stage` of 1, 2 or 3")
        if self.offload.weights != "none" and self.zero_stage != 3:
            raise ValueError(f"`offload.weights` needs `zero_stage: 3`, given {self.zero_stage}")
        return self

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
    """Supervised fine-tuning on packed conversations, the loss on answers only (paper section 3)."""

    job: Literal["finetune"] = "finetune"
    schedule: Schedule = Schedule(kind="cosine", warmup_steps=0)
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)


class EvaluationTask(Section):
    """`recognition`: image -> word. `generation`: word -> image, judged. `interleaved`: both in turn, judged."""

    name: str
    kind: Literal["recognition", "generation", "interleaved"]
    documents: str = Field(
        description="curated conversations: the user's turn is the prompt, the assistant's the answer"
    )
    limit: int | None = Field(None, ge=1)


class EvaluateSpecification(JobSpecification):
    """A model's answers to held-out conversations, judged by their words and by an independent classifier."""

    job: Literal["evaluate"] = "evaluate"
    model: str = Field(description="model directory, or models:/name@alias")
    tasks: list[EvaluationTask] = Field(min_length=1)
    judge_training: str = Field(description="curated images with captions as labels: trains the independent classifier")
    judge_held_out: str = Field(description="the same, held out: measures the classifier itself")
    batch: int = Field(32, ge=1, description="prompts answered at once")
    output: str = "evaluation"


class AblateSpecification(JobSpecification):
    """Trains the same small model with one stabilizer changed at a time, at rising learning rates; draws the curves."""

    job: Literal["ablate"] = "ablate"
    mixture: dict[str, float] = Field(min_length=1, description="token shards -> weight")
    text_tokenizer: str = "tokenizers/text"
    output: str = "ablation"
    model: ModelConfig
    z_loss: float = Field(1e-5, ge=0)
    variants: dict[str, dict[str, Any]] = Field(
        min_length=1, description="name -> what differs: fields of `model`, and z_loss"
    )
    learning_rates: list[float] = Field(min_length=1)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule(kind="cosine", warmup_steps=20)
    steps: int = Field(ge=1)
    micro_batches: int = Field(ge=1)
    log_every: int = Field(5, ge=1)

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


Resumable = TrainSpecification | ImageTokenizerSpecification  # jobs that write checkpoints

JOBS: dict[str, type[JobSpecification]] = {
    "curate": CurateSpecification,
    "train_text_tokenizer": TextTokenizerSpecification,
    "train_image_tokenizer": ImageTokenizerSpecification,
    "tokenize": TokenizeSpecification,
    "pretrain": PretrainSpecification,
    "finetune": FinetuneSpecification,
    "evaluate": EvaluateSpecification,
    "ablate": AblateSpecification,
}
S = TypeVar("S", bound=JobSpecification)


def read(kind: type[S], file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """A specification from a YAML file and `a.b=value` overrides (values are YAML). Raises SpecificationError."""
    path = Path(file)
    try:
        if not path.is_file():
            raise SpecificationError(f"there is no specification file {path}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecificationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecificationError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); is it a YAML file? Save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise SpecificationError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecificationError(f"{path} must hold a mapping of fields, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(kind, values, str(path))


def validate(kind: type[S], values: dict[str, Any], origin: str) -> S:
    """Check plain values against a specification. Raises SpecificationError, one line for each wrong field."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, e) for e in error.errors()]
        raise SpecificationError("\n".join([f"{origin}:", *(f"  {line}" for line in lines)])) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise SpecificationError(f"override {override!r} must look like field.subfield=value")
    *parents, last = path.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise SpecificationError(f"override {override!r}: {parent!r} holds a value, not a section")
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecificationError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _explain(kind: type[BaseModel], error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"]) or "(whole file)"
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(kind, error["loc"][:-1])
        return f"{location}: unknown field (given {given!r}); allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{location}: required, and not given"
    shown = "" if isinstance(given, dict) else f" (given {given!r})"
    return f"{location}: {error['msg']}{shown}"


def _fields_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields allowed at a location, found by walking the annotations."""
    models: list[type[BaseModel]] = [kind]
    for part in location:
        if not isinstance(part, str):
            continue
        inner: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                inner += _models_in(model.model_fields[part].annotation)
        models = inner or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found += _models_in(inner)
    return found
