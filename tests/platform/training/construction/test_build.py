"""An engine is built without its model ever being whole on one worker, with the weights it would have had."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.model.weights import LazyTensor, write_weights
from calumma.platform import storage
from calumma.platform.training.construction import build
from calumma.platform.training.construction.sources import AddedWeights, DirectoryWeights, SeededWeights, Wanted
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine
from calumma.platform.training.trainable import parameters

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50)
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(40, 50))
)
CPU = torch.device("cpu")


def specification(**fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/nowhere",
        "mixture": {"tokens": 1.0},
        "output": "stage",
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": 10,
        "micro_batches": 6,
        "precision": "float32",
    }
    return PretrainSpecification.model_validate(values | fields)


LORA: dict[str, Any] = {"lora": {"rank": 4}, "trainable": ["image_head", "norm.weight"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "without ZeRO": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2, bfloat16": {"zero_stage": 2, "precision": "bfloat16"},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 3, bfloat16": {"zero_stage": 3, "precision": "bfloat16"},
    "adapters": {"zero_stage": 2, **LORA},
    "adapters, ZeRO 3": {"zero_stage": 3, **LORA},
}


def build_all(rank: int, world: int, initial: str | None, folder: str) -> None:
    """Build an engine of each variant; the first worker writes down all weights, each what it holds of them."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    weights, held = {}, {}
    for name, fields in VARIANTS.items():
        described = build.describe(SHAPE, spec := specification(**fields), VOCABULARY)
        assert all(p.is_meta for p in described.model.parameters() if not hasattr(p, "drawn")) or spec.lora
        run = build.initialize(described, spec, world, CPU)
        build.fill(run, described.source(SHAPE, build.Base(initial, spec.seed), CPU))
        weights[name] = engine.gathered_weights(run, keep=rank == 0)
        held[name] = sum(p.ds_tensor.numel() if spec.zero_stage == 3 else p.numel() for p in run.module.parameters())
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
        Path(f"{folder}/held.json").write_text(json.dumps(held))


@pytest.mark.parametrize("source", ["seed", "directory"])
def test_the_weights_are_those_of_a_model_built_whole(tmp_path: Path, source: str) -> None:
    plain = Transformer(SHAPE).initialize(0)
    initial = None
    if source == "directory":
        plain.initialize(7)
        initial = str(tmp_path / "model")
        Path(initial).mkdir()
        lazy = {name: LazyTensor.of(value) for name, value in plain.state_dict().items()}
        write_weights(initial, lazy, shard_bytes=30_000)
        assert len(list(Path(initial).iterdir())) > 2
    torch.multiprocessing.start_processes(build_all, (2, initial, str(tmp_path)), nprocs=2, start_method="fork")
    found = torch.load(tmp_path / "weights.pt")
    held = json.loads((tmp_path / "held.json").read_text())
    for name, fields in VARIANTS.items():
        expected = Transformer(SHAPE)
        expected.load_state_dict(plain.state_dict())
        spec = specification(**fields)
        expected = parameters.set_trainable(expected, spec, VOCABULARY)
        assert found[name].keys() == dict(expected.named_parameters()).keys()
        for weight, value in expected.named_parameters():
            assert torch.equal(found[name][weight], value.detach().to(found[name][weight].dtype)), (name, weight)
        whole = sum(p.numel() for p in expected.parameters())
        assert held[name] == whole if spec.zero_stage < 3 else held[name] <= 0.6 * whole


def test_fresh_weights_are_drawn_as_they_are_in_place() -> None:
    whole = Transformer(SHAPE).initialize(3).state_dict()
    with torch.device("meta"):
        described = Transformer(SHAPE)
    drawn = dict(described.initial_weights(3))
    assert drawn.keys() == whole.keys()
    assert all(torch.equal(drawn[name], whole[name]) for name in whole)


@pytest.mark.parametrize("length", [8, 48])  # of a code's vector: shorter than the model is wide, and longer
def test_image_tokens_begin_as_the_codes_that_they_stand_for(tmp_path: Path, length: int) -> None:
    images = ImageTokenizer(
        ImageTokenizerConfig(
            resolution=8, codebook_size=10, embedding=length, base_channels=4, multipliers=[1, 1], residual_blocks=1
        )
    )
    images.save(tmp_path)
    spec = specification(image_embedding="codebook", image_tokenizer=str(tmp_path))
    source = build.describe(SHAPE, spec, VOCABULARY).source(SHAPE, build.Base(None, 3), CPU)
    found = torch.zeros(50, 32)
    source.fill([Wanted("embedding.weight", 0, found.view(-1))])
    plain = Transformer(SHAPE).initialize(3).embedding.weight.detach()
    codes = images.codebook.weight.detach()
    assert torch.equal(found[:40], plain[:40])
    assert found[40:].norm().item() ** 2 / 10 == pytest.approx(plain.norm().item() ** 2 / 50, rel=1e-5)
    ratio = pdist(found[40:].numpy()) / pdist(codes.numpy())
    if length <= 32:
        assert ratio == pytest.approx(ratio[0], rel=1e-4)
    else:  # a projection: near stays nearer than far
        assert np.corrcoef(pdist(found[40:].numpy()), pdist(codes.numpy()))[0, 1] > 0.5
    part = torch.zeros(70)
    source.fill([Wanted("embedding.weight", 1310, part)])
    assert torch.equal(part, found.view(-1)[1310:1380])


def test_a_codebook_of_another_size_is_told(tmp_path: Path) -> None:
    ImageTokenizer(
        ImageTokenizerConfig(resolution=8, codebook_size=7, embedding=3, base_channels=4, multipliers=[1, 1])
    ).save(tmp_path)
    spec = specification(image_embedding="codebook", image_tokenizer=str(tmp_path))
    source = build.describe(SHAPE, spec, VOCABULARY).source(SHAPE, build.Base(None, 3), CPU)
    with pytest.raises(storage.StorageError, match="does not hold a codebook of 10 codes"):
        source.fill([Wanted("embedding.weight", 0, torch.zeros(1600))])


def test_ranges_of_rows_come_from_the_rows_that_they_stand_for(tmp_path: Path) -> None:
    matrix = torch.arange(60.0).view(12, 5)
    write_weights(tmp_path, {"output.weight": LazyTensor.of(matrix)})
    rows = [2, 3, 4, 7, 9, 10]
    source = AddedWeights(
        DirectoryWeights(str(tmp_path)), {"drawn": torch.arange(4.0)}, {"rows": ("output.weight", rows, 5)}
    )
    for first in range(30):
        for last in range(first + 1, 31):
            target = torch.full((last - first,), -1.0)
            source.fill([Wanted("rows", first, target)])
            assert torch.equal(target, matrix[rows].view(-1)[first:last])
    source.fill([Wanted("drawn", 1, target := torch.zeros(2))])
    assert target.tolist() == [1.0, 2.0]


def test_a_directory_of_another_model_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, {"norm.weight": LazyTensor.of(torch.ones(5))})
    source = DirectoryWeights(str(tmp_path))
    for name, size in (("norm.weight", 6), ("embedding.weight", 1)):
        with pytest.raises(storage.StorageError, match=f"does not hold the weights of this model: {name}"):
            source.fill([Wanted(name, 0, torch.zeros(size))])
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(storage.StorageError, match=r"not a readable safetensors file|ends"):
        DirectoryWeights(str(tmp_path))
    with pytest.raises(storage.NotFound):
        DirectoryWeights(str(tmp_path / "nowhere"))


def test_a_seed_draws_what_is_wanted_alone() -> None:
    whole = Transformer(SHAPE).initialize(0).state_dict()
    target = torch.zeros(10)
    SeededWeights(SHAPE, 0, CPU).fill([Wanted("blocks.1.feed_forward.up.weight", 100, target)])
    assert torch.equal(target, whole["blocks.1.feed_forward.up.weight"].view(-1)[100:110])
