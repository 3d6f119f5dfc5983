"""What a fine-tuning does where nothing says otherwise, as specifications of the jobs that do it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calumma.jobs.tuning.fitting import fitted
from calumma.jobs.tuning.split import HELD_OUT, TRAIN, Parts
from calumma.model.config import ModelConfig
from calumma.platform.curation.specification import CurateSpecification
from calumma.platform.sources.specification import Source
from calumma.platform.specification import Resources, SpecificationError, Tracking
from calumma.platform.tokenizing.specification import PreferenceTokensSpecification, TokenizeSpecification
from calumma.platform.training.sections import Lora, Optimizer, Preference, Schedule
from calumma.platform.training.specification import FinetuneSpecification

Packing = Literal["apart", "together", "off"]

# Tokens of a micro-batch.
MICRO_BATCH_TOKENS = {"cuda": 8192, "cpu": 2048}
MULTIPLE = 64  # of which a context is one: what kernels like
LONGEST_PAIR = 4096  # tokens of a prompt with an answer, where nothing says more
ROWS = 64  # packed rows, about, that all examples make at least: few rows are few different steps
USUAL_BATCH = 32  # examples a step
USUAL_STEPS = 50  # that few examples are divided into at least, where they are enough for it
# Peak learning rates, of whole weights and of adapters, by the width of the model: 5e-5 at a width of 2,000, ten times
# as much for adapters ("LoRA Without Regret", https://thinkingmachines.ai/blog/lora/), and more for narrower models by
# the exponent that its authors measured on Llama's family (tinker-cookbook, hyperparam_utils.py).
RATE, ADAPTERS, WIDTH, EXPONENT = 5e-5, 10.0, 2000, 0.781
PAIRS = 0.1  # times that of examples: the reference is near by
WARM_UP = 0.03  # of all steps


@dataclass(frozen=True)
class Options:
    """What the command was asked. None: what `settings` takes."""

    model: str
    data: str
    out: Path
    lora: int | None = None
    dora: bool = False
    quantize: Literal[4, 8] | None = None
    preference: Literal["dpo", "ipo", "orpo"] | None = None
    beta: float = 0.1
    image_weight: float | None = None
    epochs: float = 3.0
    steps: int | None = None
    learning_rate: float | None = None
    batch: int | None = None
    context: int | None = None
    packing: Packing = "apart"
    held_out: float = 0.05
    max_bad_share: float = 0.01
    samples: int = 4
    name: str | None = None
    alias: str = "champion"
    tracking_uri: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SpecificationError for what is asked of adapters without them."""
        for name, given in (("--quantize", self.quantize), ("--dora", self.dora)):
            if given and self.lora is None:
                raise SpecificationError(f"{name} is of low-rank adapters: give their rank, say --lora 16, too")

    @property
    def root(self) -> str:
        return str(self.out.expanduser().absolute())

    @property
    def tracking(self) -> Tracking:
        return Tracking(uri=self.tracking_uri, experiment="finetune")

    @property
    def registered(self) -> str:
        """The name of the model in the registry: of the folder it is made in."""
        return self.name or self.out.expanduser().absolute().name

    def shared(self, **resources: Any) -> dict[str, Any]:
        """Fields of all specifications."""
        return {
            "storage": self.root,
            "tracking": self.tracking,
            "seed": self.seed,
            "resources": Resources(**resources),
        }


@dataclass(frozen=True)
class Machine:
    """What there is to train with."""

    cores: int
    gpus: int
    kind: str | None = None
    """Of its GPUs, where it is one that a forecast can be made for."""
    memory: float | None = None
    """Bytes of its own."""

    @classmethod
    def here(cls) -> Machine:
        from calumma.model.devices import find_gpu
        from calumma.platform.cluster import capacity

        gpus = capacity.gpus()
        if not gpus:
            return cls(capacity.cores(), 0)
        import psutil
        import torch

        found = find_gpu(torch.cuda.get_device_name(0))
        return cls(capacity.cores(), gpus, found[0] if found else None, psutil.virtual_memory().total)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def training(self) -> dict[str, Any]:
        if self.gpus:
            return {"workers": self.gpus, "cpus_per_worker": 1, "gpus_per_worker": 1}
        return {"workers": 1, "cpus_per_worker": self.cores}


@dataclass(frozen=True)
class Base:
    """The model that is tuned. `given`: what `initial` says; `directory`: its files."""

    given: str
    directory: str
    config: ModelConfig
    image_length: int


def curation(options: Options, source: Source) -> CurateSpecification:
    return CurateSpecification(
        **options.shared(workers=0), sources=[source], output="data/curated", max_bad_share=options.max_bad_share
    )


def tokenization(options: Options, base: Base, parts: Parts, machine: Machine) -> TokenizeSpecification:
    context = options.context or context_for(base.config.context, parts, options.packing)
    return TokenizeSpecification(
        **options.shared(workers=0, cpus_per_worker=machine.cores, gpus_per_worker=min(1, machine.gpus)),
        documents=[f"data/{part}" for part, count in ((TRAIN, parts.train), (HELD_OUT, parts.held_out)) if count],
        text_tokenizer=base.directory,
        image_tokenizer=f"{base.directory}/image_tokenizer",
        output="data/tokens",
        context=context,
        packing="off" if options.packing == "off" else "on",
        micro_batch=max(1, MICRO_BATCH_TOKENS[machine.device] // context),
    )


def pairs(options: Options, base: Base, machine: Machine) -> PreferenceTokensSpecification:
    context = options.context or min(base.config.context, LONGEST_PAIR)
    return PreferenceTokensSpecification(
        **options.shared(workers=0, gpus_per_worker=min(1, machine.gpus)),
        location=options.data if "://" in options.data else str(Path(options.data).expanduser().absolute()),
        text_tokenizer=base.directory,
        image_tokenizer=f"{base.directory}/image_tokenizer",
        output="data/tokens",
        held_out=options.held_out,
        max_bad_share=options.max_bad_share,
        context=context,
        micro_batch=2 * max(1, MICRO_BATCH_TOKENS[machine.device] // (2 * context)),
    )


def context_for(most: int, parts: Parts, packing: Packing) -> int:
    """Tokens of a row: as many as the longest example has, or, packed, so many that all make ROWS rows; not more than
    the model's."""
    packed = 0 if packing == "off" else parts.tokens // ROWS
    wanted = max(parts.longest - 1, packed, MULTIPLE)
    return min(most, MULTIPLE * math.ceil(wanted / MULTIPLE))


def training(
    options: Options,
    base: Base,
    parts: Parts,
    tokens: TokenizeSpecification | PreferenceTokensSpecification,
    row_groups: int,
    machine: Machine,
) -> FinetuneSpecification:
    """row_groups: micro-batches of the examples to train on."""
    pairs = isinstance(tokens, PreferenceTokensSpecification)
    batch = options.batch or max(1, min(USUAL_BATCH, round(parts.train * options.epochs / USUAL_STEPS)))
    a_micro_batch = parts.train / row_groups
    micro_batches = min(row_groups, max(1, round(batch / a_micro_batch)))
    micro_batches = max(micro_batches, math.ceil(machine.gpus / tokens.micro_batch))  # a row for every GPU
    steps = options.steps or max(1, math.ceil(options.epochs * row_groups / micro_batches))
    rate = options.learning_rate or usual_rate(base.config.width, options.lora is not None, pairs)
    spec = FinetuneSpecification(
        **options.shared(**machine.training),
        mixture={f"{tokens.output}/{TRAIN}": 1.0},
        held_out={"examples": f"{tokens.output}/{HELD_OUT}"} if parts.held_out else {},
        held_out_every=max(1, steps // 10) if parts.held_out else None,
        output="tuned",
        text_tokenizer=base.directory,
        image_tokenizer=f"{base.directory}/image_tokenizer",
        initial=base.given,
        mask_documents=None if options.packing == "together" and not pairs else True,
        preference=_preference(options) if pairs else None,
        steps=steps,
        max_epochs=max(4.0, 1.1 * steps * micro_batches / row_groups),
        micro_batches=micro_batches,
        optimizer=Optimizer(learning_rate=rate, weight_decay=0.0 if options.lora else 0.1),
        schedule=Schedule(kind="cosine", warmup_steps=math.ceil(WARM_UP * steps), final=0.1),
        lora=_adapters(options),
        precision="bfloat16" if machine.gpus else "float32",
        zero_stage=1,
        checkpoint_activations=machine.gpus > 0,
        checkpoint_every=max(1, min(500, math.ceil(steps / 4))),
        log_every=max(1, steps // 100),
        register_as=options.registered,
        alias=options.alias,
    )
    if machine.kind is None:
        return spec
    return fitted(spec, base.config, tokens.micro_batch, machine.kind, machine.gpus, machine.memory)


def _preference(options: Options) -> Preference:
    weights = {} if options.image_weight is None else {"text_weight": 1.0, "image_weight": options.image_weight}
    return Preference(loss=options.preference or "dpo", beta=options.beta, **weights)


def _adapters(options: Options) -> Lora | None:
    if options.lora is None:
        return None
    return Lora(rank=options.lora, alpha=2.0 * options.lora, dora=options.dora, quantize=options.quantize)


def usual_rate(width: int, adapters: bool, pairs: bool = False) -> float:
    """The peak learning rate, two digits of it. pairs: of preferences."""
    rate = RATE * (ADAPTERS if adapters else 1.0) * (PAIRS if pairs else 1.0) * (WIDTH / width) ** EXPONENT
    return float(f"{rate:.1e}")
