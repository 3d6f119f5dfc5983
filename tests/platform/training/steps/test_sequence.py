"""Workers that share rows take the step of workers that have whole ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.checkpoints import catalog, identity, resumption, saver
from calumma.platform.training.forecast.shape import block_bytes, shared_bytes
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import deepspeed_settings, engine, sequence
from calumma.platform.training.steps.held_out import HeldOutBatch

SIZE, TOKENS = 50, 24  # of the vocabulary; of a row
WORKERS, SHARING = 4, 2
MODEL = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=512, mask_documents=True, vocabulary_size=SIZE
)
VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 0, compiled": {"zero_stage": 0, "compile": True},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2, recomputed selectively, overlapped": {
        "zero_stage": 2, "checkpoint_activations": "selective", "overlap_communication": True,
    },
    "ZeRO 3, recomputed": {"zero_stage": 3, "checkpoint_activations": True},
}  # fmt: skip


def rows(step: int, number: int) -> HeldOutBatch:
    """Two rows of documents of odd lengths and padding, more of one part than of the other trained."""
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(0, SIZE, (2, TOKENS + 1), generator=generator)
    segments = torch.zeros_like(tokens)
    segments[0, 5:], segments[0, 11:], segments[1, 13:] = 1, 2, 1
    segments[1, 20:] = -1
    mask = torch.rand(2, TOKENS + 1, generator=generator) < torch.linspace(0.2 + 0.3 * number, 0.9, TOKENS + 1)
    return HeldOutBatch(tokens, mask & (segments >= 0), segments, number)


class Trained:
    """A worker's engine, and what it sees of steps of three micro-batches."""

    def __init__(self, spec: PretrainSpecification, rank: int, world: int) -> None:
        self.spec, self.rank, self.world, self.stability = spec, rank, world, dict[str, float]()
        model = Transformer(MODEL).initialize(0).checkpoint_activations(spec.checkpoint_activations)
        if spec.compiled:
            model.compile_blocks(backend="aot_eager")
        self.run = engine.initialize(model, spec, world)

    def steps(self, numbers: range) -> list[list[float]]:
        image_mask_V, size, seen = torch.arange(SIZE) >= 40, self.spec.sequence_parallel, []
        empty = HeldOutBatch(*(torch.zeros(0, TOKENS + 1, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
        for step in numbers:
            group = [rows(step, number) for number in range(self.rank // size, 3, self.world // size)]
            group += [empty] * (deepspeed_settings.micro_batches_a_worker(self.spec, self.world) - len(group))
            counts = engine.count_tokens(group, image_mask_V, self.run.device, size)
            local, measured = engine.step(
                self.run, group, counts, image_mask_V, 1e-3, self.world, measure=self.rank < size and step == 1
            )
            self.stability |= {name: float(x) for name, x in sequence.combined(self.run, measured).items()}
            seen.append([*engine.sum_over_workers(local).tolist(), *counts, engine.gradient_norm(self.run)])
        return seen

    def weights(self) -> dict[str, torch.Tensor]:
        return engine.gathered_weights(self.run, keep=self.rank == 0)

    def kept_bytes(self) -> int:
        """What autograd keeps of a block's forward pass over this worker's part of a row of the whole context."""
        block, kept = self.run.module.blocks[0], dict[int, int]()
        x_BtD = torch.randn(1, MODEL.context // self.spec.sequence_parallel, MODEL.width, requires_grad=True)
        rope_BtP2 = self.run.module.rope[None, : x_BtD.shape[1]]
        others = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), rope_BtP2)}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if (storage := tensor.untyped_storage())._cdata not in others:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x_BtD, rope_BtP2)
        return sum(kept.values())


def work(rank: int, specs: dict[str, PretrainSpecification], folder: str) -> None:
    """A worker that takes three steps of each variant; the first one writes down what it has seen."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(WORKERS), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORKERS)
    found = {}
    for name, spec in specs.items():
        trained = Trained(spec, rank, WORKERS)
        found[name] = {"seen": trained.steps(range(3)), "weights": trained.weights(), "stability": trained.stability}
        if name == "ZeRO 1":
            found[name]["kept_bytes"] = trained.kept_bytes()
    report = {"step": 3, "schedule_step": 3, "tokens": {}, "base": {"initial": None, "seed": 0}}
    saver.save(trained.run, catalog.checkpoint_uri(f"{folder}/stage", 3), spec, {}, report)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


def work_alone(rank: int, spec: PretrainSpecification, folder: str) -> None:
    """One worker: three steps and two more, which it takes again from the checkpoint of those that share rows. In a
    process of its own: DeepSpeed keeps its groups."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=rank, world_size=1)
    alone = Trained(spec, 0, 1)
    found = {"seen": alone.steps(range(3)), "weights": alone.weights(), "stability": dict(alone.stability)}
    found["after"] = alone.steps(range(3, 5))
    checkpoint = catalog.newest(f"{folder}/stage", identity.made_by(spec, {}))
    assert checkpoint is not None
    other = Trained(spec, 0, 1)
    resumption.load(other.run, checkpoint)
    found["resumed"] = other.steps(range(3, 5))
    torch.save(found, f"{folder}/alone.pt")


@pytest.fixture(scope="module")
def variant(stage: Callable[..., PretrainSpecification]) -> Callable[..., PretrainSpecification]:
    """variant(name, workers, sharing)"""

    def variant(name: str, workers: int, sharing: int) -> PretrainSpecification:
        return stage(
            model=MODEL.model_dump(exclude={"vocabulary_size"}),
            optimizer={"learning_rate": 0.01, "eps": 1e-3},
            sequence_parallel=sharing,
            resources={"workers": workers},
            **VARIANTS[name],
        )

    return variant


@pytest.fixture(scope="module")
def folder(variant: Callable[..., PretrainSpecification], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four workers have left that share rows by twos."""
    folder = tmp_path_factory.mktemp("sequence")
    specs = {name: variant(name, WORKERS, SHARING) for name in VARIANTS}
    torch.multiprocessing.start_processes(work, (specs, str(folder)), nprocs=WORKERS, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> dict[str, dict[str, Any]]:
    """What they have seen."""
    found: dict[str, dict[str, Any]] = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def plain(variant: Callable[..., PretrainSpecification], folder: Path) -> dict[str, Any]:
    """What one worker has seen, of whole rows."""
    specs = (variant("ZeRO 1", 1, 1), str(folder))
    torch.multiprocessing.start_processes(work_alone, specs, nprocs=1, start_method="fork")
    found: dict[str, Any] = torch.load(folder / "alone.pt")
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_workers_that_share_rows_take_the_plain_step(
    shared: dict[str, dict[str, Any]], plain: dict[str, Any], name: str
) -> None:
    """Losses of text and images, z-loss, counts and gradient norms of three steps, and the weights after them.
    Documents are told apart across the cut between the parts, and three micro-batches are odd for two groups."""
    assert shared[name]["seen"] == [pytest.approx(values, rel=1e-6) for values in plain["seen"]]
    for weight, value in plain["weights"].items():
        torch.testing.assert_close(shared[name]["weights"][weight], value, rtol=0, atol=1e-6)


def test_what_is_measured_is_of_whole_rows(shared: dict[str, dict[str, Any]], plain: dict[str, Any]) -> None:
    """Norms over all heads and tokens, the largest logit of any head; what is of a sample of tokens is of another."""
    found, expected = shared["ZeRO 1"]["stability"], plain["stability"]
    assert found.keys() == expected.keys()
    whole = [name for name in expected if name.endswith(("query_norm", "key_norm", "logit_max", "activation_rms"))]
    assert len(whole) == 8
    assert [found[name] for name in whole] == pytest.approx([expected[name] for name in whole], rel=1e-5)


def test_a_checkpoint_of_shared_rows_goes_on_with_whole_ones(plain: dict[str, Any]) -> None:
    """Written by four workers that share rows in ZeRO 3, read by one in ZeRO 1: the next steps are the same."""
    assert plain["resumed"] == [pytest.approx(values, rel=2e-6) for values in plain["after"]]


def test_activations_of_a_part_are_what_is_forecast(shared: dict[str, dict[str, Any]]) -> None:
    tokens = MODEL.context // SHARING
    expected = (block_bytes(MODEL, 4) + shared_bytes(MODEL, 4)) * tokens
    assert shared["ZeRO 1"]["kept_bytes"] == pytest.approx(expected, rel=0.05)
