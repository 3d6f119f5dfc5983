"""The forecast beside what it foretells: the real blocks on fake tensors, DeepSpeed's estimators and its engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from calumma.model.config import PRESETS, ModelConfig
from calumma.model.ops.rope import rope_table
from calumma.model.transformer import Transformer, TransformerBlock
from calumma.platform.specification import SpecificationError
from calumma.platform.training.checkpoints import layout
from calumma.platform.training.forecast import shape
from calumma.platform.training.forecast.forecast import Training, forecast
from calumma.platform.training.forecast.machines import INSTANCES, Machines, parse_nodes
from calumma.platform.training.forecast.memory import activations, gpu_memory
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.standby.segment import SLOTS, Part
from calumma.platform.training.steps import meters

BLOCKS: dict[str, dict[str, Any]] = {
    "7B": {"preset": "chameleon-7b", "dropout": 0.0},
    "7B with dropout": {"preset": "chameleon-7b"},
    "34B": {"preset": "chameleon-34b"},
    "without query-key norm": {"preset": "calumma-1.3b", "query_key_norm": False},
    "small": {"preset": "calumma-20m"},
    "Qwen's": {
        "preset": "calumma-1.3b",
        "kv_heads": 4,
        "own_head_size": 64,
        "query_key_norm": "rms",
        "query_key_value_bias": True,
        "tied": True,
    },
    "with all biases": {"preset": "calumma-20m", "attention_output_bias": True, "feed_forward_bias": True},
}


def training(micro_batch: int = 2, model: str = "chameleon-34b", **fields: Any) -> Training:
    values = {"storage": "s", "mixture": {"tokens": 1}, "output": "o", "steps": 1000, "micro_batches": 1536}
    values |= {"resources": {"workers": 64, "gpus_per_worker": 1, "cpus_per_worker": 8}, "zero_stage": 3}
    spec = PretrainSpecification(**{**values, "model": PRESETS[model], **fields})
    assert spec.model is not None
    return Training(spec, spec.model, micro_batch)


# -- sizes, beside the real model --


@pytest.mark.parametrize("shape_of", [*PRESETS.values(), *BLOCKS.values()], ids=[*PRESETS, *BLOCKS])
def test_parameters_and_arithmetic_are_the_models(shape_of: dict[str, Any]) -> None:
    config = ModelConfig(**shape_of)
    with torch.device("meta"):
        model = Transformer(config)
    assert shape.parameters(config) == {name: p.numel() for name, p in model.named_parameters()}
    found = meters.flops_per_token(model, config.context)  # which counts the norms of heads too
    assert shape.flops_per_token(config) == pytest.approx(found, rel=1e-3)


def kept_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """What autograd keeps of a block's forward pass, weights aside."""
    kept: dict[int, int] = {}
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            block = TransformerBlock(config).train()
        finally:
            torch.set_default_dtype(torch.float32)
        rope_TP2 = rope_table(config.head_size, tokens, config.rope_theta)
        others = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), rope_TP2)}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in others:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        x_BTD = torch.empty(1, tokens, config.width, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x_BTD, rope_TP2[None])
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_activations_are_what_the_block_keeps(name: str, dtype: torch.dtype) -> None:
    config, tokens = ModelConfig(**BLOCKS[name]), 512
    element = torch.finfo(dtype).bits // 8
    assert shape.block_bytes(config, element) * tokens == pytest.approx(kept_bytes(config, dtype, tokens), rel=0.05)


@pytest.mark.filterwarnings("ignore:Expected a tensor")
@pytest.mark.parametrize("recompute", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
@pytest.mark.parametrize("model", ["chameleon-7b", "chameleon-34b"])
def test_the_peak_of_a_pass_is_what_pytorchs_tracker_finds(model: str, recompute: Any) -> None:
    """Four layers and a whole context, forward and backward; gradients leave as they come, as in ZeRO 2 and 3."""
    from torch.distributed._tools.mem_tracker import MemTracker

    one = training(model=model, checkpoint_activations=recompute)
    config = one.config.model_copy(update={"layers": 4, "dropout": 0.0})
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            transformer = Transformer(config).train().checkpoint_activations(recompute)
        finally:
            torch.set_default_dtype(torch.float32)
        for parameter in transformer.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        tracker = MemTracker()
        tracker.track_external(transformer)
        with tracker:
            transformer.hidden(torch.zeros(1, config.context, dtype=torch.long)).sum().backward()
        (found,) = tracker.get_tracker_snapshot("peak").values()
    peak = found["Total"] - 2 * sum(parameter.numel() for parameter in transformer.parameters())
    assert activations(one.spec, config, 1) == pytest.approx(peak, rel=0.1)


# -- states, beside DeepSpeed's estimators --


@pytest.mark.parametrize("machines", [1, 2, 16, 128])
@pytest.mark.parametrize("model", ["chameleon-7b", "chameleon-34b"])
def test_states_are_those_of_deepspeeds_estimators(model: str, machines: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero_2

    config = ModelConfig(**PRESETS[model])
    sizes, world = shape.parameters(config), 8 * machines
    total, largest = sum(sizes.values()), max(sizes.values())

    def states(stage: int, **fields: Any) -> float:
        one = training(model=model, zero_stage=stage, **fields)
        return gpu_memory(one.spec, config, one.settings(world), world, 1).states

    offload = {"optimizer": "cpu"}
    assert states(2) == pytest.approx(zero_2(total, 8, machines, cpu_offload=False)[1], rel=0.1)
    _, theirs, gathered = zero_3(total, largest, 8, machines, cpu_offload=False, cpu_offload_params=False)
    assert states(3) == pytest.approx(theirs - gathered, rel=0.1)
    assert states(2, offload=offload) == pytest.approx(zero_2(total, 8, machines, cpu_offload=True)[1], rel=0.1)


# -- what fits, and what would --


def on(nodes: str, **changes: Any) -> Any:
    return forecast(training(**changes), parse_nodes(nodes))


@pytest.mark.parametrize(
    ("changes", "nodes", "advice"),
    [
        ({}, "8x8xH100", "checkpoint_activations: true"),
        ({"rows_per_pass": 16, "checkpoint_activations": True}, "8x8xH100", "rows_per_pass: 1"),
        ({"zero_stage": 1, "checkpoint_activations": True}, "8x8xH100", "zero_stage: "),
        ({"zero_stage": 3, "checkpoint_activations": True}, "16x8xL4", "offload: {optimizer: cpu}"),
        (
            {
                "checkpoint_activations": True,
                "rows_per_pass": 1,
                "offload": {"optimizer": "cpu"},
                "resources": {"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 8},
            },
            "8xL4",
            "use at least 16 workers",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(changes: dict[str, Any], nodes: str, advice: str) -> None:
    found = on(nodes, **changes)
    assert not found.fits
    problem = found.problems[0]
    assert advice in problem.advice, problem
    if "set " in problem.advice:  # followed, it fits
        fields = yaml.safe_load("{" + problem.advice.removeprefix("set ").split(", which")[0] + "}")
        followed = on(nodes, **{**changes, **fields})
        assert followed.memory.total <= followed.gpu_memory >= followed.memory_of_fewest


def test_muon_that_does_not_fit_is_told_to_be_adamw_where_parts_are_needed() -> None:
    """It moves whole matrices, so no other stage of ZeRO is to be had with it."""
    muon = {"optimizer": {"kind": "muon", "learning_rate": 0.002}, "zero_stage": 0, "precision": "float32"}
    muon |= {"checkpoint_activations": True, "rows_per_pass": 1}
    [problem] = [p for p in on("8x8xH100", model="chameleon-7b", **muon).problems if "a GPU are needed" in p.message]
    assert problem.field == "optimizer"
    assert "optimizer.kind: adamw" in problem.advice
    stage = int(problem.advice.partition("zero_stage: ")[2][0])
    adamw = muon | {"optimizer": {"learning_rate": 0.002}, "zero_stage": stage}
    assert on("8x8xH100", model="chameleon-7b", **adamw).fits


def test_copies_in_memory_take_what_their_memory_does() -> None:
    """Of eight workers of a host, and as many again of the host whose copies it has."""
    resources = {"workers": 64, "gpus_per_worker": 1, "cpus_per_worker": 8, "recovery": {"copy_every": 1}}
    more = training(resources=resources).host(64, 8) - training().host(64, 8)
    states = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), torch.float32)
    numel = sum(shape.parameters(ModelConfig(**PRESETS["chameleon-34b"])).values()) // 64
    _, found = layout.part_layout([("weight", 0, numel)], states, ["weight"])
    part = Part("group", 0, 64, found, states, ("weight",))
    assert more == pytest.approx(2 * 8 * SLOTS * part.slot_bytes, rel=1e-3)


def test_copies_on_a_hosts_disk_take_what_its_parts_of_checkpoints_do() -> None:
    """Three of them at once, of eight workers: header, state and checksums as they are written."""
    resources = {"workers": 64, "gpus_per_worker": 1, "cpus_per_worker": 8, "recovery": {"node_local": "/nvme"}}
    states = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), torch.float32)
    numel = sum(shape.parameters(ModelConfig(**PRESETS["chameleon-34b"])).values()) // 64
    header, part = layout.part_layout([("weight", 0, numel)], states, ["weight"])
    found = on("8x8xH100", resources=resources, checkpoint_activations=True)
    assert found.fits
    assert found.host_disk == pytest.approx(3 * 8 * (len(header) + part.data_bytes), rel=1e-3)
    assert found.host_disk < found.host_disk_has == 8 * 3.84e12
    assert on("8x8xH100", checkpoint_activations=True).host_disk is None
    small = replace(INSTANCES["p5.48xlarge"], disk=found.host_disk * 0.99)
    (problem,) = forecast(training(resources=resources, checkpoint_activations=True), Machines(small, 8)).problems
    assert str(problem).startswith("resources.recovery.node_local: a host with 8 workers keeps ")
    unknown = forecast(training(resources=resources, checkpoint_activations=True), parse_nodes("16x4xH100"))
    assert (unknown.fits, unknown.host_disk_has) == (True, None)


def test_workers_without_a_place_or_work_are_told() -> None:
    few = on("8xH100", checkpoint_activations=True)
    assert "64 workers" in few.problems[0].message
    assert "set it to 8 or less, or use 8 of these machines" in few.problems[0].advice
    idle = on("512x8xH100", checkpoint_activations=True, rows_per_pass=2, resources={
        "workers": 4096, "gpus_per_worker": 1, "cpus_per_worker": 8,
    })  # fmt: skip
    assert [problem.advice for problem in idle.problems] == ["set resources.workers to at most 3072"]


def test_rows_that_are_too_long_for_one_gpu_are_shared() -> None:
    """34B at 128 thousand tokens: a part of the activations each, and as many whole groups as there are."""
    long = PRESETS["chameleon-34b"] | {"context": 131_072}
    asked = {"workers": 64, "gpus_per_worker": 1, "cpus_per_worker": 8}
    changes = {"checkpoint_activations": True, "rows_per_pass": 1, "micro_batches": 64, "resources": asked}

    def of(nodes: str, **more: Any) -> Any:
        one = training(**changes | more)
        return forecast(replace(one, config=ModelConfig(**long)), parse_nodes(nodes))

    alone = of("8x8xH100")
    assert not alone.fits
    shared = of("8x8xH100", sequence_parallel=8)
    assert shared.fits, shared.problems
    assert shared.memory.activations == pytest.approx(alone.memory.activations / 8, rel=0.1)
    assert shared.memory.states == alone.memory.states
    assert (shared.passes, shared.time.arithmetic_seconds) == (16, pytest.approx(alone.time.arithmetic_seconds))
    config, sent = ModelConfig(**long), shared.time.network_bytes - alone.time.network_bytes * shared.passes / 2
    token = 2 * 2 * config.head_size * (config.heads + config.kv_heads)  # q, k, v and the result, in bfloat16
    exchanged = 16 * 131_072 / 8 * config.layers * token * 3 * 7 / 8
    assert sent == pytest.approx(exchanged, rel=0.05)
    elastic = asked | {"workers": {"min": 8, "max": 64}}
    assert of("7x8xH100", sequence_parallel=8, resources=elastic | {"cpus_per_worker": 22}).workers == 56
    assert of("10x8xH100", sequence_parallel=16, resources=elastic | {"workers": {"min": 16, "max": 96}}).workers == 80


def test_what_cannot_be_shared_is_told() -> None:
    (problem,) = on("8x8xH100", checkpoint_activations=True, sequence_parallel=16).problems
    assert str(problem).startswith("sequence_parallel: 16 workers cannot share 8 key-value heads")


def test_a_group_must_fit_at_its_smallest() -> None:
    """With 3,072 workers 34B's states are small; with 4 they are not."""
    resources = {"workers": {"min": 4, "max": 64}, "gpus_per_worker": 1, "cpus_per_worker": 8}
    found = on("8x8xH100", checkpoint_activations=True, resources=resources)
    assert found.memory.total < found.gpu_memory < found.memory_of_fewest
    assert "with 4 workers" in found.problems[0].message


def test_speed_follows_the_machines() -> None:
    one, two = (on(nodes, checkpoint_activations=True).time for nodes in ("8x8xH100", "8x8xB200"))
    assert two.arithmetic_seconds == pytest.approx(one.arithmetic_seconds * 989 / 2250)
    assert two.network_seconds == one.network_seconds
    assert one.days == pytest.approx(1000 * one.step_seconds / 86400, rel=0.1)
    assert one.dollars == pytest.approx(one.days * 24 * 8 * 39.33)


@pytest.mark.parametrize("text", ["8", "xH100", "8xA1000", "0xH100", "1x2x3xH100", "2x2xp5.48xlarge", "-1xH100", ""])
def test_machines_that_nobody_knows_are_told(text: str) -> None:
    with pytest.raises(SpecificationError, match=r"^--nodes: "):
        parse_nodes(text)


def test_machines_are_described() -> None:
    assert parse_nodes("8xH100") == Machines(INSTANCES["p5.48xlarge"], 1)
    assert parse_nodes("3x8xH100") == parse_nodes("3xp5.48xlarge")
    half = parse_nodes("2x4xH100")
    assert (half.gpus, half.machine.price) == (8, pytest.approx(39.33 / 2))
