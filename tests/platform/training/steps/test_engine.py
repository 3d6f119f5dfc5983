"""DeepSpeed under our settings: what is refused, steps that are not taken, and training of a part of the weights."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError, validate
from calumma.platform.training.forecast import shape as shape_of
from calumma.platform.training.forecast.pace import network_bytes
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import deepspeed_settings, engine
from calumma.platform.training.steps.held_out import HeldOutBatch
from calumma.platform.training.trainable import parameters

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50)
IMAGE_IDS, Z_LOSS = list(range(40, 48)), 0.02
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=IMAGE_IDS
)


def specification(**fields: Any) -> PretrainSpecification:
    values: dict[str, Any] = {
        "storage": "/nowhere",
        "mixture": {"tokens": 1.0},
        "output": "stage",
        "model": SHAPE.model_dump(exclude={"vocabulary_size"}),
        "steps": 10,
        "micro_batches": 3,
        # nothing is torch's default: what is not handed on shows
        "optimizer": {
            "learning_rate": 0.01,
            "beta1": 0.7,
            "beta2": 0.8,
            "eps": 1e-4,
            "weight_decay": 0.5,
            "gradient_clip": 0.5,
        },
        "precision": "float32",
    }
    return PretrainSpecification.model_validate(values | fields)


# -- settings --


def test_settings_become_deepspeeds_and_raw_ones_have_the_last_word() -> None:
    spec = specification(deepspeed={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    made = deepspeed_settings.deepspeed_config(spec, world=2, parameters=1000)
    assert made["gradient_accumulation_steps"] == 2  # three micro-batches on two workers
    assert made["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu"},
    } | ({} if torch.cuda.is_available() else {"use_multi_rank_bucket_allreduce": False})
    assert made["gradient_clipping"] == spec.optimizer.gradient_clip


def test_offloading_becomes_deepspeeds_sections() -> None:
    spec = specification(zero_stage=3, offload={"optimizer": "nvme", "weights": "cpu", "nvme_path": "/disk"})
    zero = deepspeed_settings.deepspeed_config(spec, world=1, parameters=10)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/disk"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload": {"optimizer": "nvme"}}, "`nvme` needs `nvme_path`"),
        ({"precision": "bfloat16", "zero_stage": 0}, "`zero_stage: 0` needs `precision: float32`: .*counts Adam"),
        ({"float8": True, "precision": "bfloat16"}, "`float8` needs GPUs"),
        ({"offload": {"optimizer": "cpu"}, "zero_stage": 0}, "`offload.optimizer` needs a `zero_stage` of 1, 2 or 3"),
        ({"offload": {"weights": "cpu"}, "zero_stage": 2}, "`offload.weights` needs `zero_stage: 3`, given 2"),
        ({"trainable": []}, "`trainable` names nothing"),
        ({"trainable": "all", "lora": {}}, "contradict each other"),
        ({"lora": {"rank": 0}}, r"lora\.rank.*greater than or equal to 1"),
        ({"faults": {"action": "ignore"}}, r"faults\.action.*'skip' or 'roll_back'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_specification(fields: dict[str, Any], said: str) -> None:
    values = specification().model_dump(mode="json") | fields
    with pytest.raises(SpecificationError, match=said):
        validate(PretrainSpecification, values, "stage.yaml")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"zero_optimization": {"overlap_com": True}}, r"DeepSpeed refuses these settings: overlap_com: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"reduce_bucket_size: .*given -1"),
        (
            {"gradient_cliping": 1.0},
            r"deepspeed\.gradient_cliping: DeepSpeed knows no such setting; is gradient_clipping",
        ),
        ({"gradient_accumulation_steps": 4}, r"deepspeed\.gradient_accumulation_steps: .* decided by `micro_batches`"),
        ({"scheduler": {"type": "WarmupLR"}}, r"deepspeed\.scheduler: .* decided by `schedule`"),
        ({"zero_optimization": {"stage": 3}}, r"deepspeed\.zero_optimization\.stage: .* decided by `zero_stage`"),
        ({"checkpoint": {"tag_validation": "Perhaps"}}, r"DeepSpeed refuses these settings: .*"),
    ],
)
def test_raw_settings_are_judged_by_deepspeed(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecificationError, match=said):
        deepspeed_settings.check_deepspeed_settings(specification(deepspeed=raw))


def test_raw_settings_that_deepspeed_knows_are_taken() -> None:
    deepspeed_settings.check_deepspeed_settings(
        specification(deepspeed={"zero_optimization": {"overlap_comm": False}, "prescale_gradients": True})
    )
    deepspeed_settings.check_deepspeed_settings(
        specification(deepspeed={"optimizer": {"type": "Adam", "params": {"lr": 0.1}}, "flops_profiler": {}})
    )


# -- the optimizer --


def test_norms_do_not_decay_and_every_weight_is_in_one_group() -> None:
    transformer = Transformer(SHAPE)
    decayed, kept = engine.parameter_groups(transformer, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in transformer.named_parameters()}
    assert sorted(names[id(p)] for group in (decayed, kept) for p in group["params"]) == sorted(names.values())
    assert all("norm" in names[id(p)] for p in kept["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])


# -- steps of two workers at every stage of ZeRO --


def rows(step: int, number: int) -> HeldOutBatch:
    generator = torch.Generator().manual_seed(100 * step + number)
    tokens = torch.randint(0, 50, (2, 17), generator=generator)
    return HeldOutBatch(tokens, torch.rand(2, 17, generator=generator) < 0.5, torch.zeros_like(tokens))


EMPTY = HeldOutBatch(*(torch.zeros(0, 17, dtype=kind) for kind in (torch.long, torch.bool, torch.long)))
PRECISE: dict[str, dict[str, Any]] = {
    f"{kind}, ZeRO {stage}": {"zero_stage": stage, "precision": kind}
    for kind in ("float32", "bfloat16")
    for stage in (0, 1, 2, 3)
    if (kind, stage) != ("bfloat16", 0)
}
CHOICES: dict[str, dict[str, Any]] = {
    "image_head": {"trainable": "image_head"},
    "patterns": {"trainable": ["blocks.1.*", "norm.weight"]},
    "lora": {"lora": {"rank": 4, "targets": ["*.attention.*"]}, "trainable": "image_head"},
}


def taken(spec: PretrainSpecification, rank: int, world: int, plan: list[tuple[int, str]]) -> dict[str, torch.Tensor]:
    """Plain weights after a plan of (step, what becomes of it): taken, refused, or broken, its gradient no number."""
    model = parameters.set_trainable(Transformer(SHAPE).initialize(0), spec, VOCABULARY)
    run = engine.initialize(model, spec, world)
    mask_V = VOCABULARY.mask(IMAGE_IDS)
    usual, norms = engine.losses, []
    for step, what in plan:
        group = [rows(step, number) for number in range(rank, 3, world)]
        group += [EMPTY] * (deepspeed_settings.micro_batches_a_worker(spec, world) - len(group))
        counts = engine.count_tokens(group, mask_V, run.device)
        if what == "broken" and rank == 1:
            engine.losses = lambda *given, **named: _broken(usual(*given, **named))
        engine.step(run, group, counts, mask_V, Z_LOSS, world, accept=lambda sums, what=what: what != "refused")
        engine.losses = usual
        norms.append(engine.gradient_norm(run))
    assert [bool(torch.isfinite(torch.tensor(norm))) for norm in norms] == [what != "broken" for _, what in plan]
    NORMS.append(norms[0])
    return parameters.plain_weights(engine.gathered_weights(run, keep=True), spec, VOCABULARY)


def sent_and_foretold(stage: int, world: int) -> tuple[float, float]:
    """Bytes that a worker sends in a step of three passes: by DeepSpeed's own log of its collectives, in rings; and by
    the forecast."""
    from deepspeed.comm import comm

    shape = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "ffn_width": 384, "context": 16}
    log = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False}}
    spec = specification(
        zero_stage=stage,
        precision="bfloat16" if stage else "float32",
        micro_batches=3 * world,
        model=shape,
        deepspeed=log,
    )
    config = spec.model.model_copy(update={"vocabulary_size": SHAPE.vocabulary_size})
    run = engine.initialize(Transformer(config).initialize(0), spec, world, passes=3)
    mask_V, group = VOCABULARY.mask(IMAGE_IDS), [rows(0, number) for number in range(3)]
    for _ in range(3):  # the first ones also tell the workers about each other
        comm.comms_logger.reset_data()
        engine.step(run, group, engine.count_tokens(group, mask_V, run.device), mask_V, Z_LOSS, world)
    sent, part = 0.0, (world - 1) / world
    shares = {"all_reduce": 2 * part, "reduce_scatter_tensor": part, "all_gather_into_tensor": part * world}
    for name, sizes in comm.comms_logger.get_raw_data().items():
        sent += sum(shares.get(name, 1.0) * size * count for size, (count, *_) in sizes.items())
    comm.comms_logger.enabled = False
    settings = deepspeed_settings.deepspeed_config(spec, world, sum(shape_of.parameters(config).values()), 3)
    return sent, network_bytes(spec, config, settings, world, passes=3)


NORMS: list[float] = []  # of the first step of each call of `taken` in this process


def _broken(found: Any) -> Any:
    return found._replace(total=found.total * torch.nan)


def work(rank: int, world: int, folder: str) -> None:
    """Everything that the tests below look at, in one pair of processes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's calls of torch
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    for name, fields in PRECISE.items():
        spec = specification(**fields)
        plans = {
            "without": [(0, "taken"), (1, "taken"), (3, "taken")],
            "refused": [(0, "taken"), (1, "taken"), (2, "refused"), (3, "taken")],
            "broken": [(0, "taken"), (1, "taken"), (2, "broken"), (3, "taken")],
        }
        found[name] = {plan: taken(spec, rank, world, steps) for plan, steps in plans.items()}
        found[name]["norm"] = NORMS[-1]
    for name, fields in CHOICES.items():
        for stage in (0, 1, 2, 3):
            spec = specification(zero_stage=stage, **fields)
            found[f"{name} {stage}"] = taken(spec, rank, world, [(step, "taken") for step in range(3)])
    offloaded = {"zero_stage": 2, "precision": "bfloat16", "offload": {"optimizer": "cpu", "pin_memory": False}}
    plan = [(step, "taken") for step in range(3)]
    found["kept"] = taken(specification(**offloaded | {"offload": {}}), rank, world, plan)
    found["offloaded"] = taken(specification(**offloaded), rank, world, plan)
    found["sent"] = [sent_and_foretold(stage, world) for stage in (0, 1, 2, 3)]
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("engine"))
    torch.multiprocessing.spawn(work, (2, folder), nprocs=2)
    return torch.load(f"{folder}/found.pt")


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("plan", ["refused", "broken"])
def test_a_step_that_is_refused_or_has_no_finite_gradient_leaves_no_trace(
    found: dict[str, Any], name: str, plan: str
) -> None:
    """Neither in weights nor in the optimizer: the step after it moves the weights as if it had not been."""
    expected = found[name]["without"]
    for weight, value in found[name][plan].items():
        assert torch.equal(value, expected[weight]), weight
    initial = Transformer(SHAPE).initialize(0).state_dict()
    assert not any(torch.equal(value.float(), initial[weight]) for weight, value in expected.items())


@pytest.mark.parametrize("name", PRECISE)
def test_the_gradient_is_that_of_plain_pytorch(found: dict[str, Any], name: str) -> None:
    """Of the whole global batch, whatever its division into workers and micro-batches: it decides what is clipped."""
    plain, mask_V = Transformer(SHAPE).initialize(0), VOCABULARY.mask(IMAGE_IDS)
    trained = sum(int(rows(0, number).mask[:, 1:].sum()) for number in range(3))
    for number in range(3):
        batch = rows(0, number)
        tokens, targets, mask = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.mask[:, 1:]
        plain(
            tokens,
            batch.segments[:, :-1],
            targets=targets,
            mask=mask,
            image_mask=mask_V,
            z_loss=Z_LOSS,
            normalizer=trained,
        ).total.backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert found[name]["norm"] == pytest.approx(float(expected), rel=1e-5 if "float32" in name else 0.02)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_are_those_of_plain_pytorch(found: dict[str, Any], stage: int) -> None:
    """Two workers at any stage of ZeRO: AdamW with its betas and its decay, the gradient clipped."""
    plain, o = Transformer(SHAPE).initialize(0), specification().optimizer
    named = list(plain.named_parameters())
    groups = [
        {"params": [p for name, p in named if "norm" not in name], "weight_decay": o.weight_decay},
        {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps)
    for step in (0, 1, 3):  # of the plan "without"
        batches = [rows(step, number) for number in range(3)]
        trained = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        for batch in batches:
            tokens, targets, mask = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.mask[:, 1:]
            logits = plain(tokens)[mask]
            nll = torch.nn.functional.cross_entropy(logits, targets[mask], reduction="sum")
            ((nll + Z_LOSS * (torch.logsumexp(logits, dim=-1) ** 2).sum()) / trained).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.parameters(), o.gradient_clip) > o.gradient_clip
        optimizer.step()
        optimizer.zero_grad()
    for weight, value in plain.state_dict().items():
        torch.testing.assert_close(found[f"float32, ZeRO {stage}"]["without"][weight], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_the_output_rows_of_image_ids_move(found: dict[str, Any], stage: int) -> None:
    """Weight decay is strong here; the other rows keep every bit."""
    initial = Transformer(SHAPE).initialize(0).state_dict()
    for name, weight in found[f"image_head {stage}"].items():
        if name != "output.weight":
            assert torch.equal(weight, initial[name]), name
    moved = (found[f"image_head {stage}"]["output.weight"] != initial["output.weight"]).all(dim=1)
    assert moved.nonzero()[:, 0].tolist() == IMAGE_IDS


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_the_named_weights_move(found: dict[str, Any], stage: int) -> None:
    initial = Transformer(SHAPE).initialize(0).state_dict()
    moved = {name for name, weight in found[f"patterns {stage}"].items() if not torch.equal(weight, initial[name])}
    assert moved == {name for name in initial if name.startswith("blocks.1.") or name == "norm.weight"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_move_their_layers_and_an_image_head_beside_them(found: dict[str, Any], stage: int) -> None:
    initial = Transformer(SHAPE).initialize(0).state_dict()
    changed = {name: weight - initial[name] for name, weight in found[f"lora {stage}"].items()}
    moved = {name for name, difference in changed.items() if difference.any()}
    layers = {name for name in initial if ".attention." in name and "norm" not in name}
    assert moved == layers | {"output.weight"}
    for name in layers:
        assert torch.linalg.matrix_rank(changed[name], rtol=1e-4) <= 4


@pytest.mark.parametrize("choice", CHOICES)
def test_all_stages_of_zero_train_a_part_alike(found: dict[str, Any], choice: str) -> None:
    """The gradient is clipped in these steps: one that was scaled otherwise would show."""
    for stage in (1, 2, 3):
        for name, weight in found[f"{choice} {stage}"].items():
            torch.testing.assert_close(weight, found[f"{choice} 0"][name], rtol=0, atol=2e-4)


def test_an_offloaded_optimizer_takes_the_same_steps(found: dict[str, Any]) -> None:
    for name, weight in found["offloaded"].items():
        torch.testing.assert_close(weight, found["kept"][name], rtol=0, atol=1e-2)


def test_the_specification_with_all_of_it_is_plain_data() -> None:
    spec = specification(lora={"rank": 2}, trainable=["image_head"], faults={"action": "roll_back"}, zero_stage=3)
    assert PretrainSpecification.model_validate(json.loads(spec.model_dump_json())) == spec
    assert Path("/nowhere/stage") == Path(spec.locate(spec.output))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_forecast_knows_what_a_step_sends(found: dict[str, Any], stage: int) -> None:
    sent, foretold = found["sent"][stage]
    assert foretold == pytest.approx(sent, rel=0.1)
