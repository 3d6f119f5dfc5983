"""Weights are read in the dtype asked for, in little more memory than they take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calumma.model import weights
from calumma.model.config import ModelConfig
from calumma.model.generation import Shard, read_shard
from calumma.model.loading import read_transformer
from calumma.model.ops.int8 import Int8Matrix, linear, quantize
from calumma.model.transformer import Transformer
from calumma.model.weights import LazyTensor, open_weights, write_weights

WORKER = Path(__file__).with_name("loading_worker.py")
SHAPE = ModelConfig(vocabulary_size=50, layers=2, width=32, heads=4, kv_heads=2, ffn_width=49, context=64)


def write(folder: Path, config: ModelConfig) -> Transformer:
    transformer = Transformer(config).initialize(0)
    config.save(folder)
    write_weights(folder, {name: LazyTensor.of(value) for name, value in transformer.state_dict().items()})
    return transformer


def test_float32_files_are_loaded_in_bfloat16_with_a_chunk_of_them_in_memory(tmp_path: Path) -> None:
    """100 MB in float32, whose largest tensor is 46 MB; of shards no more than the shard. A chunk is 2 MB; the rest
    is for Python, the allocator, and the kernel's counting."""
    write(
        tmp_path,
        ModelConfig(vocabulary_size=24000, layers=1, width=480, heads=16, kv_heads=16, ffn_width=1408, context=64),
    )
    assert (tmp_path / weights.FILE).stat().st_size > 100e6
    told = subprocess.run([sys.executable, str(WORKER), str(tmp_path)], check=True, capture_output=True, text=True)
    beyond = json.loads(told.stdout)
    assert beyond.keys() == {"bfloat16", "int8", "first shard", "second shard"}
    assert all(much <= 2 * 2**20 + 2**20 for much in beyond.values()), beyond


@given(rows=st.integers(0, 9), columns=st.integers(0, 5), data=st.data())
def test_chunks_make_up_what_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, data: st.DataObject
) -> None:
    folder, stored = tmp_path_factory.mktemp("weights"), torch.randn(rows, columns)
    write_weights(folder, {"w": LazyTensor.of(stored)})
    cut = [sorted([data.draw(st.integers(0, size)), data.draw(st.integers(0, size))]) for size in stored.shape]
    where = tuple(slice(*each) for each in cut[: data.draw(st.integers(0, 2))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_BYTES", data.draw(st.integers(1, 200)))
        for entry in (open_weights(folder)["w"], LazyTensor.of(stored)):
            assert torch.equal(entry.load(where=where), stored[where])
            assert torch.equal(entry.load(dtype=torch.bfloat16, where=where), stored[where].bfloat16())


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path, SHAPE)
    SHAPE.model_copy(update={"ffn_width": 64}).save(tmp_path)
    with pytest.raises(ValueError, match=r"down\.weight is \[32, 49\], and its config\.json describes \[32, 64\]"):
        read_transformer(tmp_path)


def test_whole_weights_can_be_trained_and_shards_or_int8_cannot(tmp_path: Path) -> None:
    write(tmp_path, SHAPE)
    assert all(weight.requires_grad for weight in read_transformer(tmp_path).parameters())
    assert not any(weight.requires_grad for weight in read_shard(tmp_path, Shard(0, 2)).parameters())
    quantized = read_transformer(tmp_path, int8=True)
    assert {weight.dtype for weight in quantized.parameters() if not weight.requires_grad} == {
        torch.int8,
        torch.float32,
    }


def values(matrix: Int8Matrix) -> Tensor:
    return matrix.values_OI * matrix.scale_O[:, None]


@given(outputs=st.integers(1, 9), inputs=st.sampled_from([1, 7, 32, 48, 64]), rows=st.sampled_from([1, 3, 17]))
def test_int8_is_the_nearest_and_multiplies_as_its_values_do(outputs: int, inputs: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.randn(outputs, 1, generator=generator).exp()
    weight[0] = 0
    matrix = quantize(weight)
    assert ((values(matrix) - weight).abs() <= matrix.scale_O[:, None] * 0.5001).all()
    x = torch.randn(1, rows, inputs, generator=generator)
    assert torch.allclose(linear(x, matrix), x @ values(matrix).T, atol=1e-4, rtol=1e-4)
    half = linear(x.bfloat16(), matrix)
    assert half.dtype == torch.bfloat16
    bound = x.abs() @ values(matrix).abs().T  # of the sum that is rounded
    assert ((half.float() - x @ values(matrix).T).abs() <= bound / 64 + 1e-6).all()


@pytest.mark.parametrize("count", [1, 3])
def test_int8_is_read_by_chunks_and_by_shards(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 3000)
    stored = write(tmp_path, SHAPE).state_dict()
    for index in range(count):
        shard = Shard(index, count)
        found = dict(read_shard(tmp_path, shard, int8=True).named_parameters())
        for name, weight in stored.items():
            own = weight[shard.slices(name, SHAPE)]
            if (scale := found.get(f"{name.removesuffix('.weight')}.scale")) is None:
                assert torch.equal(found[name], own)
            else:
                expected = quantize(own)
                assert torch.equal(found[name], expected.values_OI)
                assert torch.equal(scale, expected.scale_O)
    assert sum(weight.dtype == torch.int8 for weight in found.values()) == 7 * SHAPE.layers
