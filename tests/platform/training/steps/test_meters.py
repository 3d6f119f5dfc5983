"""FLOPs, peaks, clocks: what training says about its speed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.steps import meters
from calumma.platform.training.steps.engine import Counts
from calumma.platform.training.trainable import parameters

SHAPE = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, ffn_width=64, context=16, vocabulary_size=50)
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(40, 48))
)


def model(**fields: Any) -> Transformer:
    spec = PretrainSpecification.model_validate(
        {"storage": "/x", "mixture": {"tokens": 1.0}, "output": "stage", "model": SHAPE.model_dump(), "steps": 1}
        | {"micro_batches": 1}
        | fields
    )
    return parameters.set_trainable(Transformer(SHAPE), spec, VOCABULARY)


BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # query and output, key and value, feed-forward
NORMS = 2 * (4 + 2) * 8  # query and key norms are matrices [heads, head size], too
OUTPUT = 50 * 32
ATTENTION = 2 * 32 * 16  # width x context


def test_flops_are_six_a_weight_and_twelve_a_layer_width_and_position() -> None:
    found = meters.flops_per_token(model(), 16)
    assert found == 6 * (3 * (BLOCK + NORMS) + OUTPUT) + 12 * 3 * 32 * 16


def test_they_are_what_pytorch_counts_in_forward_and_backward() -> None:
    """PyTorch's counter sees the matrix products; the norms' weights are no products, and its attention is whole."""
    from torch.utils.flop_counter import FlopCounterMode

    transformer, tokens = model(), torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        transformer(tokens).sum().backward()
    assert counter.get_total_flops() / 16 == pytest.approx(meters.flops_per_token(transformer, 16), rel=0.08)


def test_frozen_weights_cost_no_gradient_and_below_the_lowest_trained_layer_there_is_no_backward() -> None:
    whole = meters.flops_per_token(model(), 16)
    head = meters.flops_per_token(model(trainable="output.weight"), 16)
    assert head == 2 * 3 * (BLOCK + NORMS) + 4 * 3 * 32 * 16 + 6 * OUTPUT
    last = meters.flops_per_token(model(trainable="blocks.2.*"), 16)
    adapters = meters.flops_per_token(model(lora={"rank": 1}), 16)
    ranks = 3 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)  # inputs and outputs of every adapted layer
    assert adapters == 4 * (3 * (BLOCK + NORMS) + OUTPUT) + 12 * 3 * 32 * 16 + 6 * ranks
    assert head < last < adapters < whole


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float32, 67e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
    ],
)
def test_a_device_in_the_table_has_its_data_sheets_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert meters.peak_flops(torch.device("cuda"), dtype) == expected


def test_a_device_without_an_entry_is_measured_and_no_random_number_is_taken_from_training() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert 1e8 < meters.peak_flops(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.rand(4), expected)


def test_the_utilization_is_of_all_workers() -> None:
    one, two = (meters.Utilization(model(), torch.device("cpu"), "float32", world) for world in (1, 2))
    assert one.metrics(100.0) == {}
    one._peak = two._peak = 1e9
    assert two.metrics(100.0)["mfu"] == one.metrics(100.0)["mfu"] / 2
    assert one.metrics(100.0)["mfu"] == pytest.approx(100 * meters.flops_per_token(model(), 16) / 1e9)


def test_the_clock_tells_activities_apart_and_starts_anew() -> None:
    clock = meters.ActivityClock()
    with clock("compute"):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="no"), clock("data"):
        raise ValueError("no")
    found = clock.read()
    assert found.keys() == {f"seconds/{name}" for name in meters.ACTIVITIES}
    assert found["seconds/compute"] >= 0.02 > found["seconds/data"] > 0
    assert set(clock.read().values()) == {0.0}


def test_an_interval_has_means_over_its_tokens() -> None:
    interval = meters.LossInterval(torch.device("cpu"))
    interval.add(torch.tensor([6.0, 8.0, 100.0]), Counts(3, 2, 10))
    interval.add(torch.tensor([2.0, 0.0, 20.0]), Counts(1, 0, 2))
    found = interval.metrics(0.5)
    assert (found["loss_text"], found["loss_image"], found["loss"]) == (2.0, 4.0, 16 / 6)
    assert found["perplexity_text"] == pytest.approx(7.389, rel=1e-3)
    assert (found["z"], found["z_loss"]) == (20.0, 10.0)


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    assert meters.exponential(1e4) == float("inf")
