"""From a description to an engine whose workers each hold their part, and nothing more on the way.

The model is described on PyTorch's meta device, which has no memory. `materialize` gives it its place: all of it on
every worker, or, with ZeRO 3, one layer after the other, cut up at once. What the weights are comes then: each worker
reads or draws the ranges that it owns (`fill`), and the workers hand round what all need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.checkpoints import catalog
from calumma.platform.training.checkpoints.agreement import raise_on_all
from calumma.platform.training.checkpoints.fragments import MASTER, OwnedState
from calumma.platform.training.construction.quantizing import fill_quantized
from calumma.platform.training.construction.sources import (
    AddedWeights,
    CheckpointWeights,
    CodeRows,
    DirectoryWeights,
    SeededWeights,
    Wanted,
    WeightSource,
)
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.steps import deepspeed_settings, float8
from calumma.platform.training.steps import engine as engines
from calumma.platform.training.trainable import parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Base:
    """What the weights are that are not trained, and those that a training starts from."""

    initial: str | None
    """A model directory, or a checkpoint of a stage that trained all; none: fresh weights."""
    seed: int

    def to_json(self) -> dict[str, Any]:
        return {"initial": self.initial, "seed": self.seed}


@dataclass(frozen=True)
class Described:
    """A Transformer as it is trained, without memory; what adapters start as; which rows the image head has; of which
    matrices magnitudes are the lengths of rows."""

    model: Transformer
    drawn: Mapping[str, Tensor]
    rows_of: Mapping[str, tuple[str, list[int], int]]
    lengths_of: Mapping[str, tuple[str, int]]
    code_rows: CodeRows | None = None
    """What image tokens' rows of the embedding begin as where weights are fresh; none: drawn as all are."""

    def source(self, config: ModelConfig, base: Base, device: torch.device) -> WeightSource:
        """Raises StorageError."""
        plain: WeightSource
        if base.initial is None:
            plain = SeededWeights(config, base.seed, device, self.code_rows)
        elif (manifest := Manifest.find(base.initial)) is not None and manifest.kind == catalog.KIND:
            plain = CheckpointWeights(base.initial, manifest)
        else:
            plain = DirectoryWeights(base.initial)
        return AddedWeights(plain, self.drawn, self.rows_of, self.lengths_of)


def describe(config: ModelConfig, spec: TrainSpecification, vocabulary: Vocabulary) -> Described:
    """Raises SpecificationError as `parameters.check_trainable`."""
    with torch.device("meta"):
        model = Transformer(config)
    model = parameters.set_trainable(model, spec, vocabulary)
    drawn = {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
    rows, lengths = parameters.added_rows(model, vocabulary), parameters.lengths_of_rows(model)
    codes = None
    if spec.image_embedding == "codebook":
        codes = CodeRows(spec.locate(spec.image_tokenizer), vocabulary.image_codes)
    return Described(model, drawn, rows, lengths, codes)


def initialize(
    described: Described, spec: TrainSpecification, world: int, device: torch.device, passes: int | None = None
) -> DeepSpeedEngine:
    """The engine of a described model. Its weights are not settled yet: `fill`, or load a checkpoint. `passes` as in
    `deepspeed_config`."""
    if spec.float8:
        float8.convert(described.model)
    model = described.model.checkpoint_activations(spec.checkpoint_activations)
    configuration = deepspeed_settings.deepspeed_config(spec, world, sum(p.numel() for p in model.parameters()))
    materialize(model, spec, device, configuration)
    if spec.compiled:
        model.compile_blocks()
    return engines.initialize(model, spec, world, passes)


def materialize(
    model: nn.Module, spec: TrainSpecification, device: torch.device, configuration: dict[str, Any]
) -> None:
    """Give a described model memory for weights, in place; with ZeRO 3 for this worker's part of them."""
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    first: Any = None
    made: dict[Any, nn.Parameter] = {}  # what modules share stays one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module.register_parameter(name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(module, name, buffer.to(device))
        own = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        if spec.zero_stage == 3 and own:
            if first is None:
                engines.partition(_OwnParameters(own), configuration, dtype)
                first = own[0]
            else:
                first.convert_to_zero_parameters(param_list=own)
    if isinstance(model, Transformer):
        model.rebuild_rope(device)


class _OwnParameters(nn.Module):
    """Some parameters as a module."""

    def __init__(self, own: list[nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterList(own)


def fill(
    engine: DeepSpeedEngine,
    source: WeightSource,
    trained: bool = True,
    frozen: bool = True,
    beat: Callable[[], object] = lambda: None,
) -> None:
    """Fill the weights that are trained, those that are not, or both from a source: each worker what it owns, and what
    is quantized whole. The optimizer of those trained begins anew. Every worker calls it; `beat` is called as it goes
    on. Raises StorageError on all of them."""
    if frozen:
        fill_quantized(engine.module, source, engine.device, beat)
    owned, others, failed = OwnedState(engine), _Frozen(engine), None
    if not trained and not others.parameters:
        return
    try:
        if not trained:
            source.fill(others.wanted(), beat)
        for number, fragments in enumerate(owned.filling([MASTER], 0) if trained else ()):
            wanted = [Wanted(f.parameter, f.offset, f.states[MASTER]) for f in fragments]
            source.fill(wanted + (others.wanted() if number == 0 and frozen else []), beat)
    except storage.StorageError as error:
        failed = error
    raise_on_all(failed)
    if frozen:
        others.settle()
    owned.settle()


class _Frozen:
    """The weights that no optimizer knows: this worker's part of them."""

    def __init__(self, engine: Any) -> None:
        self._cut = engine.zero_optimization_stage() == 3
        self.parameters = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
        rank, world = dist.get_rank(), dist.get_world_size()
        self._ranges: dict[str, tuple[int, int]] = {}
        """Parameter -> its first own element and how many."""
        total, before = sum(p.numel() for p in self.parameters.values()), 0
        for name, parameter in self.parameters.items():
            if self._cut:
                part = parameter.partition_numel()
                offset = min(rank * part, parameter.ds_numel)
                self._ranges[name] = offset, min(part, parameter.ds_numel - offset)
                continue
            first = min(max(total * rank // world - before, 0), parameter.numel())
            last = max(min(total * (rank + 1) // world - before, parameter.numel()), first)
            self._ranges[name] = first, last - first
            before += parameter.numel()

    def wanted(self) -> list[Wanted]:
        found = []
        for name, (offset, numel) in self._ranges.items():
            parameter = self.parameters[name]
            own = parameter.ds_tensor.data[:numel] if self._cut else parameter.data.view(-1)[offset : offset + numel]
            if numel:
                found.append(Wanted(name, offset, own))
        return found

    def settle(self) -> None:
        """Hand round what every worker needs whole."""
        if self._cut:
            return
        for name, parameter in self.parameters.items():
            offset, numel = self._ranges[name]
            flat = parameter.data.view(-1)
            flat[:offset].zero_()
            flat[offset + numel :].zero_()
            if dist.get_world_size() > 1:
                dist.all_reduce(flat)
