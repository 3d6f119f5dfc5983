"""One small training in one process, in plain PyTorch: what an ablation and a ladder are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from calumma.model import vocabulary as model_vocabulary
from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.shards.row_groups import RowGroupReader, all_micro_batches
from calumma.platform.specification import SpecificationError
from calumma.platform.storage.manifest import Manifest
from calumma.platform.streaming.plan import Plan
from calumma.platform.training.steps import engine, held_out
from calumma.platform.training.trials.specification import TrialsSpecification


@dataclass(frozen=True)
class Corpus:
    """What trials read. `image_mask_V`: BoolTensor on the device that they train on."""

    plan: Plan
    reader: RowGroupReader
    manifests: Mapping[str, Manifest]
    image_mask_V: torch.Tensor

    @classmethod
    def open(cls, spec: TrialsSpecification, seed: int, hold_back: int = 0) -> Corpus:
        """In the order of a seed, without the last `hold_back` files of each source; sets this process's threads.
        Raises StorageError, ManifestError, PlanError."""
        vocabulary = read_vocabulary(spec)
        mixture = {spec.locate(uri): weight for uri, weight in spec.mixture.items()}
        manifests = {uri: divided(uri, hold_back)[0] for uri in mixture}
        plan = Plan(seed, mixture, manifests, spec.micro_batches)
        device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(spec.resources.cpus_per_worker)))
        image_mask_V = vocabulary.mask(vocabulary.image_ids).to(device)
        return cls(plan, RowGroupReader(plan.context), manifests, image_mask_V)

    @property
    def device(self) -> torch.device:
        return self.image_mask_V.device

    def batches(self, step: int) -> list[held_out.HeldOutBatch]:
        """The micro-batches of a step. Raises ShardError and StorageError."""
        found = [held_out.read_row_group(self.reader, one) for one in self.plan.step(step)]
        return [replace(batch, number=number) for number, batch in enumerate(found)]

    def first_batches(self) -> list[held_out.HeldOutBatch]:
        """The first micro-batch of each source, on which instruments are read again and again: how sources take turns
        does not show."""
        firsts = (all_micro_batches(uri, manifest)[0] for uri, manifest in self.manifests.items())
        return [held_out.read_row_group(self.reader, first) for first in firsts]


class Step(NamedTuple):
    """What one step found: summed loss (nats), trained tokens, the gradient's norm before clipping."""

    nll: float
    tokens: int
    gradient_norm: float


class Trial:
    """A model and its optimizer; each `step` reads the next step of the corpus. In bfloat16 the model computes in it
    and AdamW moves float32 masters, as DeepSpeed has it."""

    def __init__(
        self,
        corpus: Corpus,
        transformer: Transformer,
        groups: list[dict[str, Any]],
        spec: TrialsSpecification,
        z_loss: float,
        seed: int,
    ) -> None:
        """`groups`: AdamW's, of the transformer's parameters; the rate of a step counts `scale` times in a group that
        has one."""
        self.corpus, self.transformer, self.spec, self.z_loss, self.seed = corpus, transformer, spec, z_loss, seed
        self.taken = 0
        self._pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if spec.precision == "bfloat16":
            groups = [group | {"params": [self._master(p) for p in group["params"]]} for group in groups]
            transformer.to(torch.bfloat16)
        o = spec.optimizer
        self.optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps)

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        master = parameter.detach().clone().requires_grad_()
        self._pairs.append((parameter, master))
        return master

    def step(self, rate: float) -> Step:
        """One optimizer step. Raises ShardError and StorageError."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        torch.manual_seed(hash((self.seed, self.taken)) % 2**63)  # of dropout: the same after a resumption
        batches = self.corpus.batches(self.taken)
        targets, nll = sum(int(batch.mask[:, 1:].sum()) for batch in batches), 0.0
        settings = {"z_loss": self.z_loss, "normalizer": max(targets, 1)}
        for batch in batches:
            found = engine.losses(self.transformer, batch, self.corpus.image_mask_V, **settings)
            found.total.backward()
            nll += float(found.sums.text_nll + found.sums.image_nll)
        for parameter, master in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(moved, self.spec.optimizer.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in self._pairs:
                parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        self.transformer.zero_grad(set_to_none=True)
        self.taken += 1
        return Step(nll, targets, float(norm))

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on; the tensors are those in use, not copies."""
        masters = [master.detach() for _, master in self._pairs]
        weights = {} if masters else self.transformer.state_dict()
        return {"taken": self.taken, "weights": weights, "masters": masters, "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, which is copied."""
        self.taken = state["taken"]
        if self._pairs:
            with torch.no_grad():
                for (parameter, master), kept in zip(self._pairs, state["masters"], strict=True):
                    master.copy_(kept)
                    parameter.copy_(kept)
        else:
            self.transformer.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])

    def instruments(self, batches: list[held_out.HeldOutBatch]) -> dict[str, float]:
        """Those of all layers (model/ops/stability.py), without dropout, by measure the layer that matters: the
        largest, of the residual stream the last. Means over the micro-batches, of the attention logit the maximum."""
        self.transformer.eval()
        with torch.no_grad():
            each = [
                _by_measure(engine.losses(self.transformer, batch, self.corpus.image_mask_V, measure=True).stability)
                for batch in batches
            ]
        self.transformer.train()
        means = {name: sum(values[name] for values in each) / len(each) for name in each[0]}
        return means | {"attention_logit_max": max(values["attention_logit_max"] for values in each)}


def _by_measure(stability: Mapping[str, torch.Tensor]) -> dict[str, float]:
    def layers(name: str) -> list[float]:
        return [float(value) for key, value in sorted(stability.items()) if key.endswith(f"/{name}")]

    found = {name: max(layers(name)) for name in ("query_norm", "key_norm", "attention_logit_max")}
    found["activation_rms"] = layers("activation_rms")[-1]
    return found | {name: float(stability[name]) for name in ("logit_norm", "log_z", "log_z_max")}


def fresh(config: ModelConfig, vocabulary_size: int, seed: int, device: torch.device) -> Transformer:
    """A model with fresh weights."""
    shape = config.model_copy(update={"vocabulary_size": vocabulary_size})
    return Transformer(shape).initialize(seed).to(device)


def divided(uri: str, hold_back: int) -> tuple[Manifest, Manifest]:
    """Token shards without their last files, and those alone. Raises SpecificationError where nothing is left, and
    StorageError and ManifestError."""
    manifest = Manifest.read(uri)
    if hold_back >= len(manifest.files):
        raise SpecificationError(
            f"hold_back: {hold_back} of the {len(manifest.files)} files of {uri} leave nothing to train on"
        )
    cut = len(manifest.files) - hold_back
    parts = (manifest.files[:cut], manifest.files[cut:])
    first, last = (manifest.model_copy(update={"files": files}) for files in parts)
    return first, last


def read_vocabulary(spec: TrialsSpecification) -> Vocabulary:
    """That of the token shards. Raises StorageError."""
    place = storage.join(spec.locate(spec.text_tokenizer), model_vocabulary.FILE)
    return Vocabulary.model_validate_json(storage.read_bytes(place))


def require_shards(spec: TrialsSpecification, uris: Iterator[str]) -> None:
    """Raises SpecificationError when token shards are not there."""
    missing = [uri for uri in map(spec.locate, uris) if Manifest.find(uri) is None]
    if missing:
        raise SpecificationError(f"no token shards are published at {missing[0]}; run the job tokenize first")
