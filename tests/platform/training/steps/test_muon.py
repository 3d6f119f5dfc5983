"""Muon beside torch's own, and beside AdamW for what is no matrix of a block."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import engine, muon

SHAPE = ModelConfig(layers=2, width=32, heads=2, kv_heads=1, ffn_width=48, context=16, vocabulary_size=40)
RATE, DECAY = 0.01, 0.1


def optimizer(model: Transformer) -> muon.Muon:
    groups = muon.groups(model, engine.parameter_groups(model, DECAY))
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
        momentum=muon.MOMENTUM,
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


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_an_update_is_nearly_the_orthogonal_factor(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = muon.orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ vh).flatten(), 0) > 0.95


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
