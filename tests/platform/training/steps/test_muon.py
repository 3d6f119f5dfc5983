"""Muon beside torch's own, and beside AdamW for what is no matrix of a block."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.transformer import Transformer
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine, muon

SHAPE = ModelConfig(layers=2, width=32, heads=2, kv_heads=1, ffn_width=48, context=16, vocabulary_size=40)
RATE, DECAY, MOMENTUM = 0.01, 0.1, 0.95


def optimizer(model: Transformer) -> muon.Muon:
    groups = muon.groups(model, engine.parameter_groups(model, DECAY), MOMENTUM)
    return muon.Muon(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-5)


def test_every_weight_has_one_group_and_matrices_of_blocks_are_muons() -> None:
    model = Transformer(SHAPE).initialize(0)
    groups = optimizer(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    moved = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(moved) == sorted(names.values())
    orthogonal = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert orthogonal == {
        name
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and "norm" not in name and p.dim() == 2
    }
    assert {group["weight_decay"] for group in groups if group["muon"]} == {DECAY}


def test_matrices_move_as_by_torchs_muon_and_all_else_as_by_adamw() -> None:
    ours, theirs = (Transformer(SHAPE).initialize(0) for _ in range(2))
    own = optimizer(ours)
    names = {id(p): name for name, p in ours.named_parameters()}
    matrices = {names[id(p)] for group in own.param_groups if group["muon"] for p in group["params"]}
    named = dict(theirs.named_parameters())
    torchs = torch.optim.Muon(
        [named[name] for name in matrices],
        lr=RATE,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(engine.parameter_groups(theirs, DECAY), lr=RATE, betas=(0.9, 0.95), eps=1e-5)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        for name, p in ours.named_parameters():
            p.grad = torch.randn(p.shape, generator=random)
            named[name].grad = p.grad.clone()
        own.step()
        torchs.step()
        for name in matrices:
            named[name].grad = None
        adamw.step()
    for name, p in ours.named_parameters():
        moved, expected = p.detach() - before[name], named[name].detach() - before[name]
        if name in matrices:  # torch's computes in bfloat16
            assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.999, name
            assert float((moved - expected).norm() / expected.norm()) < 0.03, name
        else:
            assert torch.equal(p, named[name]), name


def test_convolutions_move_as_matrices_by_torchs_muon_and_those_at_the_pixels_by_adamw() -> None:
    config = ImageTokenizerConfig(resolution=8, codebook_size=8, embedding=4, base_channels=8, multipliers=[1, 2])
    tokenizer = ImageTokenizer(config)
    groups = muon.convolution_groups(tokenizer, 0.9)
    names = {id(p): name for name, p in tokenizer.named_parameters()}
    moved = {names[id(p)]: p for p in groups[0]["params"]}
    assert sorted(names.values()) == sorted(names[id(p)] for group in groups for p in group["params"])
    assert not {"encoder.conv_in.weight", "decoder.conv_out.weight", "codebook.weight"} & moved.keys()
    assert {p.dim() for p in moved.values()} == {4}
    assert {p.dim() for p in groups[1]["params"] if "conv_" not in names[id(p)]} <= {1, 2}
    matrices = {name: p.detach().flatten(1).clone().requires_grad_() for name, p in moved.items()}
    own = muon.Muon(groups, lr=RATE, weight_decay=DECAY, fused=True)
    torchs = torch.optim.Muon(
        matrices.values(), lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    before = {name: p.detach().clone() for name, p in moved.items()}
    random = torch.Generator().manual_seed(1)
    for _ in range(4):
        for name, p in moved.items():
            p.grad = torch.randn(p.shape, generator=random)
            matrices[name].grad = p.grad.flatten(1).clone()
        own.step()
        torchs.step()
    for name, p in moved.items():
        change, expected = (p.detach() - before[name]).flatten(1), matrices[name].detach() - before[name].flatten(1)
        assert torch.nn.functional.cosine_similarity(change.flatten(), expected.flatten(), 0) > 0.999, name
        assert float((change - expected).norm() / expected.norm()) < 0.03, name


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_an_update_is_nearly_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = muon.orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vh).flatten(), 0) > 0.95


def test_the_workers_updates_are_all_made_once_and_cost_about_the_same() -> None:
    weights = [p for p in Transformer(SHAPE).initialize(0).parameters() if p.dim() == 2]
    for workers in (1, 2, 3, 40):
        shares = muon.shares_of(weights, workers)
        assert sorted(id(p) for share in shares for p in share) == sorted(map(id, weights))
        costs = [sum(min(p.shape) * p.numel() for p in share) for share in shares]
        assert max(costs) - min(costs) <= max(min(p.shape) * p.numel() for p in weights)


def pretrain(**given: object) -> PretrainSpecification:
    return PretrainSpecification.model_validate(
        {
            "storage": "x",
            "mixture": {"tokens": 1},
            "output": "o",
            "model": SHAPE.model_dump(),
            "steps": 1,
            "micro_batches": 1,
        }
        | given
    )


def test_it_is_refused_where_it_would_see_no_matrices() -> None:
    wanted = {"optimizer": {"kind": "muon"}, "precision": "float32"}
    assert pretrain(**wanted).zero_stage == 0
    with pytest.raises(ValidationError, match="set `zero_stage: 0`"):
        pretrain(**wanted, zero_stage=1)
    with pytest.raises(ValidationError, match="set `zero_stage: 0`"):
        pretrain(optimizer={"kind": "muon"}, precision="bfloat16")
    with pytest.raises(ValidationError, match="both choose an optimizer"):
        pretrain(**wanted, deepspeed={"optimizer": {"type": "Adam"}})
