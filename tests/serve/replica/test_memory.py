"""Which cards hold which model, in what, and what is said of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calumma.model.config import ImageTokenizerConfig, preset
from calumma.model.generation.cache.device_memory import HostMemory
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.image_layers import GroupNorm
from calumma.serve.deploy.preparation import ServeError, require_memory
from calumma.serve.replica.memory import DoesNotFit, MemoryPlan, fitting, image_tokenizer_bytes, memory_budget, plan
from calumma.serve.settings import ModelSettings
from tests.model.generation.memory_device import CountedDevice

GIB = 2**30
# What PyTorch reports of cards that are sold with 16 (T4), 24 (A10), 40, 48 (L40S), 80 and 141 GB.
CARDS = {16: 14.6, 24: 22.0, 40: 39.4, 48: 44.4, 80: 79.1, 141: 139.8}


def planned(name: str, card: int, gpus: int = 1, **changes: Any) -> MemoryPlan:
    settings = ModelSettings(model=name, gpus_per_replica=gpus, tensor_parallel=gpus, **changes)
    return plan(settings, preset(name), ImageTokenizerConfig(), int(CARDS[card] * GIB))


@pytest.mark.parametrize(
    ("name", "card", "gpus", "dtype", "positions"),
    [
        ("chameleon-7b", 24, 1, "int8", 14_000),
        ("chameleon-7b", 40, 1, "bfloat16", 30_000),
        ("chameleon-7b", 48, 1, "bfloat16", 40_000),
        ("chameleon-7b", 80, 1, "bfloat16", 95_000),
        ("chameleon-34b", 48, 1, "int8", 11_000),
        ("chameleon-34b", 80, 1, "int8", 150_000),
        ("chameleon-34b", 80, 2, "bfloat16", 380_000),
        ("chameleon-34b", 141, 1, "bfloat16", 300_000),
    ],
)
def test_the_published_models_start_with_defaults(name: str, card: int, gpus: int, dtype: str, positions: int) -> None:
    """All that is counted, in order: weights, image tokenizer and the processes, activations, recorded passes."""
    found = planned(name, card, gpus)
    assert found.dtype == dtype
    assert positions <= found.positions <= 1.3 * positions
    assert found.fixed + found.footprint.cache(found.positions) <= 0.9 * CARDS[card] * GIB


def test_what_does_not_fit_is_refused_with_the_numbers_and_with_what_would() -> None:
    with pytest.raises(DoesNotFit) as told:
        planned("chameleon-34b", 40)
    message = str(told.value)
    assert "chameleon-34b does not fit a GPU of 42.3 GB, of which a replica may fill 38.1 GB (memory: 0.9)" in message
    assert "In int8: weights 35.4 GB, image tokenizer 2.6 GB, activations 1.1 GB, reserved 1.3 GB" in message
    assert "a cache for one context of 4096 0.9 GB; 41.3 GB together" in message
    assert message.endswith("What would fit: tensor_parallel: 2, gpus_per_replica: 2 (bfloat16)")
    assert "\n" not in message, "Ray Serve keeps the last line"


@pytest.mark.parametrize(
    ("name", "card", "changes", "ways"),
    [
        ("chameleon-7b", 16, {}, ["context: 2048", "tensor_parallel: 2"]),
        ("chameleon-7b", 24, {"dtype": "bfloat16", "cache_tokens": 8192}, ["dtype: int8", "tensor_parallel: 2"]),
        ("chameleon-7b", 24, {"dtype": "float32"}, ["dtype: bfloat16", "dtype: int8", "tensor_parallel: 2"]),
        ("chameleon-7b", 40, {"cache_tokens": 10**6}, ["cache_tokens: "]),
        ("chameleon-7b", 24, {"memory": 0.55}, ["context: 1024"]),
        ("chameleon-34b", 16, {}, ["tensor_parallel: 4, gpus_per_replica: 4 (int8)"]),
    ],
)
def test_what_is_named_as_fitting_fits(name: str, card: int, changes: dict[str, Any], ways: list[str]) -> None:
    with pytest.raises(DoesNotFit) as told:
        planned(name, card, **changes)
    named = str(told.value).partition("What would fit: ")[2]
    assert all(way in named for way in ways), named
    for way in named.split("; "):
        pairs = dict(pair.split(": ") for pair in way.partition(" (")[0].split(", "))
        numbers = {key: value if key == "dtype" else int(value) for key, value in pairs.items()}
        gpus = numbers.pop("tensor_parallel", 1)
        numbers.pop("gpus_per_replica", None)
        planned(name, card, gpus, **changes | numbers)  # type: ignore[arg-type]


def test_the_releases_image_tokenizer_takes_what_is_counted_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupNorm, "forward", nn.GroupNorm.forward)  # as on GPUs: it does not look at what it computes
    config = ImageTokenizerConfig()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        tokenizer, device = ImageTokenizer(config), CountedDevice(10**12)
        with device:
            device.hold(list(tokenizer.parameters()))
            held = device.used
            encoding = device.peak(lambda: tokenizer.encode(torch.zeros(1, 3, config.resolution, config.resolution)))
            decoding = device.peak(lambda: tokenizer.decode(torch.zeros(1, config.codes_per_image, dtype=torch.long)))
    assert encoding
    assert decoding
    assert held + max(encoding, decoding) <= image_tokenizer_bytes(config, 2**18) <= 2 * held + 2 * encoding


def test_images_coded_elsewhere_and_shared_gpus_count() -> None:
    alone, elsewhere = planned("chameleon-7b", 80), planned("chameleon-7b", 80, image_coders=1)
    assert elsewhere.positions > alone.positions + 3000
    settings = ModelSettings(model="m", gpus_per_replica=0.5)
    half = plan(settings, preset("chameleon-7b"), ImageTokenizerConfig(), int(CARDS[80] * GIB))
    assert half.available == pytest.approx(alone.available / 2, abs=1)
    assert half.positions < alone.positions / 2


def test_an_engine_on_a_cpu_has_a_cache_of_whole_contexts_unless_told(model_directory: Path) -> None:
    settings = ModelSettings(model="m", max_sequences=3)
    config, images = preset("chameleon-7b"), ImageTokenizerConfig()
    budget = memory_budget(settings, config, images)
    assert (budget.most, budget.alone, budget.share) == (3 * 4096, False, 0.9)
    told = memory_budget(settings.model_copy(update={"memory": 0.5, "min_replicas": 2}), config, images)
    assert (told.most, told.share, told.part) == (12 * 4096, 0.5, 0.5)
    assert fitting(settings, model_directory).dtype == "float32"
    assert fitting(settings.model_copy(update={"dtype": "int8"}), model_directory).dtype == "int8"


def test_a_model_is_refused_before_anything_starts(model_directory: Path) -> None:
    settings = ModelSettings(model="tiny")
    require_memory(settings, str(model_directory))
    with pytest.raises(ServeError, match=r"tiny does not fit a machine of 0\.2 MB.*What would fit: nothing: use a dev"):
        require_memory(settings, str(model_directory), total=200_000)
    assert HostMemory().total > 10**9
