"""What of a model is trained: everything, names by pattern, the rows of images, low-rank adapters.

Whatever was trained, `plain_weights` gives back the weights of an ordinary Transformer: for checkpoints to be
exported, model directories and later stages.

Shape suffixes: B rows of a micro-batch, T tokens, V vocabulary, D width, K ids of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calumma.model.ops import stability
from calumma.model.ops.adapter import Adapter
from calumma.model.ops.loss import linear_logprobs, linear_loss
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import TrainSpecification
from calumma.platform.training.trainable import lora

ALL, IMAGE_HEAD, IMAGE_ROWS = "all", "image_head", "image_rows"
_ROWS = "image_rows"  # a parameter of embedding and output
_PARTS = ((IMAGE_HEAD, "output.weight"), (IMAGE_ROWS, "output.weight"), (IMAGE_ROWS, "embedding.weight"))


class ImageHead(Output):
    """The output projection with the rows of some ids as a parameter of their own, all others frozen.

    Masking the gradient of the whole matrix would not do: weight decay still pulls at rows without gradient, and the
    optimizer would keep state for all of them, eight times as much at 8,192 image ids of 65,536.
    """

    def __init__(self, plain: Output, ids: list[int], embedding: ImageEmbedding | None = None) -> None:
        """embedding: with which it shares its rows, if it does."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = plain.weight.shape
        self.tied = embedding is not None
        self.register_parameter("bias", None)
        if embedding is None:
            self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
            self.image_rows = nn.Parameter(plain.weight.detach()[ids].clone())
        else:
            self.weight, self.image_rows = embedding.weight, embedding.image_rows
        self.register_buffer("ids_K", torch.tensor(ids), persistent=False)

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Any:
        weight_VD = self.weight.index_copy(0, self.get_buffer("ids_K"), self.image_rows)
        if not loss:
            return F.linear(input, weight_VD if columns is None else weight_VD[columns]).float()
        if loss.pop("scores", False):
            return linear_logprobs(input, weight_VD, loss["targets_BT"], loss["rows_R"])
        measured = stability.output(input.flatten(0, 1), loss["rows_R"], weight_VD) if measure else None
        return *linear_loss(input, weight_VD, **loss), measured


class ImageEmbedding(nn.Embedding):
    """The embedding with the rows of some ids as a parameter of their own, all others frozen."""

    def __init__(self, plain: nn.Embedding, ids: list[int]) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = plain.weight.shape
        self.weight = nn.Parameter(plain.weight.detach(), requires_grad=False)
        self.image_rows = nn.Parameter(plain.weight.detach()[ids].clone())
        place_V = torch.full((self.num_embeddings,), -1)
        place_V[ids] = torch.arange(len(ids))
        self.register_buffer("place_V", place_V, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        place_BT = self.get_buffer("place_V")[input]
        own_BTD = F.embedding(place_BT.clamp(min=0), self.image_rows)
        return torch.where(place_BT[..., None] >= 0, own_BTD, F.embedding(input, self.weight))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {len(self.image_rows)} trained"


def set_trainable(model: Transformer, spec: TrainSpecification, vocabulary: Vocabulary) -> Transformer:
    """Freeze what is not trained, in place; add adapters and image rows. Raises as `check_trainable`."""
    if ALL in spec.trainable_names:
        return model
    check_trainable(model, spec)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in _patterns(spec)))
    if spec.lora:
        lora.add_adapters(model, spec.lora, spec.seed)
    if IMAGE_HEAD in spec.trainable_names:
        model.output = ImageHead(model.output, vocabulary.image_ids)
    elif IMAGE_ROWS in spec.trainable_names:
        ids = image_rows(vocabulary)
        model.embedding = embedding = ImageEmbedding(model.embedding, ids)
        model.output = ImageHead(model.output, ids, embedding if model.config.tied else None)
    return model


def image_rows(vocabulary: Vocabulary) -> list[int]:
    """The ids that a text model lacked: codes of images, and what begins and ends one."""
    return [vocabulary.begin_image, vocabulary.end_image, *vocabulary.image_ids]


def check_trainable(model: Transformer, spec: TrainSpecification) -> None:
    """Whether `trainable` and `lora` fit a model, which may be on the meta device. Raises SpecificationError."""
    names = [name for name, _ in model.named_parameters()]
    if model.config.tied and IMAGE_HEAD in spec.trainable_names:
        raise SpecificationError(
            "trainable: `image_head` trains rows of the output projection alone, which is the embedding in this model; "
            "train `image_rows`, which are of both, or make the model with an output of its own (extend hf --untie)"
        )
    adapted = [f"{layer}.weight" for layer in lora.target_layers(model, spec.lora)] if spec.lora else []
    for pattern in _patterns(spec):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise SpecificationError(
                f"trainable: {pattern!r} is none of `all`, `image_head`, `image_rows`, and no parameter is called so; "
                f"there are {', '.join(lora.name_patterns(names))}"
            )
        if both := sorted(set(matched) & set(adapted)):
            raise SpecificationError(
                f"trainable: {pattern!r} trains {both[0]} as a whole, for which lora.targets asks for an adapter; "
                "choose one of the two"
            )
        for part, whole in _PARTS:
            if part in spec.trainable_names and whole in matched:
                raise SpecificationError(
                    f"trainable: {pattern!r} trains {whole} as a whole, of which `{part}` is a part; choose one"
                )
    if IMAGE_HEAD in spec.trainable_names and IMAGE_ROWS in spec.trainable_names:
        raise SpecificationError("trainable: `image_head` is a part of `image_rows`; choose one")


def plain_weights(weights: Mapping[str, Tensor], spec: TrainSpecification, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The weights of an ordinary Transformer: adapters merged, image rows put back in their places."""
    merged = lora.merge_adapters(weights, spec.lora.scale) if spec.lora else dict(weights)
    ids = vocabulary.image_ids if IMAGE_HEAD in spec.trainable_names else image_rows(vocabulary)
    for module in ("output", "embedding"):
        if (rows_KD := merged.pop(f"{module}.{_ROWS}", None)) is not None:
            weight_VD, ids_K = merged[f"{module}.weight"], torch.tensor(ids, device=rows_KD.device)
            merged[f"{module}.weight"] = weight_VD.index_copy(0, ids_K, rows_KD)
    return merged


def added_rows(model: nn.Module, vocabulary: Vocabulary) -> dict[str, tuple[str, list[int], int]]:
    """Parameters that begin as rows of a matrix: which matrix, which rows, and their width."""
    found: dict[str, tuple[str, list[int], int]] = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        if own == _ROWS:
            head = len(parameter) == len(vocabulary.image_ids)
            ids = vocabulary.image_ids if head else image_rows(vocabulary)
            found[name] = (f"{module}.weight", ids, parameter.shape[-1])
    return found


def lengths_of_rows(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Parameters that begin as the lengths of a matrix's rows: which matrix, and how wide it is."""
    return {
        f"{name}.{lora.MAGNITUDE}": (f"{name}.weight", module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLinear) and module.lora_magnitude is not None
    }


def adapter_of(weights: Mapping[str, Tensor], spec: TrainSpecification, vocabulary: Vocabulary) -> Adapter:
    """What was trained, beside the weights that it starts from: adapters, and the weights that were trained whole."""
    assert spec.lora is not None
    plain = plain_weights(
        {name: weight for name, weight in weights.items() if not lora.is_part(name)}, spec, vocabulary
    )
    patterns = [*_patterns(spec), *(whole for part, whole in _PARTS if part in spec.trainable_names)]
    whole = {name: weight for name, weight in plain.items() if any(fnmatchcase(name, each) for each in patterns)}
    return replace(lora.adapter_of(weights, spec.lora.scale), whole=whole)


def is_added(name: str) -> bool:
    """Whether a parameter of this name is one that a plain model has not."""
    return name.rpartition(".")[2] == _ROWS or lora.is_part(name)


def _patterns(spec: TrainSpecification) -> list[str]:
    return [name for name in spec.trainable_names if name not in (ALL, IMAGE_HEAD, IMAGE_ROWS)]
