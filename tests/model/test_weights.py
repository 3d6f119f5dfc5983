"""Weights on disk: what is written is read, by us and by safetensors, tensor by tensor, in one file or in shards."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from calumma.model.weights import DTYPES, FILE, INDEX, LazyTensor, open_weights, write_weights

shape = st.lists(st.integers(0, 5), max_size=3)
described = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shape, st.sampled_from(list(DTYPES.values()))))


def tensor(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Any bytes, as that dtype."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@given(described=described, shard_bytes=st.integers(1, 400))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    described: dict[str, tuple[list[int], torch.dtype]],
    shard_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    weights = {name: tensor(*described[name]) for name in described if name != "__metadata__"}
    write_weights(folder, {name: LazyTensor.of(value) for name, value in weights.items()}, shard_bytes)
    read = open_weights(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    library = {name: value for file in files for name, value in load_file(folder / file).items()}
    assert set(read) == set(library) == set(weights)
    for name, value in weights.items():
        assert (read[name].shape, read[name].dtype) == (tuple(value.shape), value.dtype)
        for found in (read[name].read(), library[name]):
            assert found.dtype == value.dtype
            assert found.reshape(-1).view(torch.uint8).tolist() == value.reshape(-1).view(torch.uint8).tolist()
    assert (files == [FILE]) == (not (folder / INDEX).exists())


def test_shards_stay_below_the_size_asked_for(tmp_path: Path) -> None:
    weights = {f"w{k}": LazyTensor.of(torch.full((k + 1,), float(k))) for k in range(12)}
    write_weights(tmp_path, weights, shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    sizes: dict[str, int] = {}
    for name, file in index["weight_map"].items():
        sizes[file] = sizes.get(file, 0) + weights[name].bytes
    assert index["metadata"]["total_size"] == sum(sizes.values()) == 4 * 78
    assert all(size <= 60 for size in sizes.values())
    assert set(sizes) == {path.name for path in tmp_path.glob("*.safetensors")}


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read() -> Tensor:
        nonlocal most
        made = torch.zeros(1000)
        alive.add(made)
        most = max(most, len(alive))
        return made

    write_weights(tmp_path, {f"w{k}": LazyTensor((1000,), torch.float32, read) for k in range(10)})
    assert most == 1


def test_writing_again_leaves_no_stale_index(tmp_path: Path) -> None:
    weights = {f"w{k}": LazyTensor.of(torch.full((4,), float(k))) for k in range(4)}
    write_weights(tmp_path, weights, shard_bytes=16)
    write_weights(tmp_path, {"only": LazyTensor.of(torch.ones(2))})
    assert set(open_weights(tmp_path)) == {"only"}
    write_weights(tmp_path, weights, shard_bytes=16)
    assert set(open_weights(tmp_path)) == set(weights)
    assert not (tmp_path / FILE).exists()


def test_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w was announced as \[3\] torch.float32 and came as \[2\] torch.float16"):
        write_weights(tmp_path, {"w": LazyTensor((3,), torch.float32, lambda: torch.zeros(2, dtype=torch.float16))})


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        open_weights(tmp_path)
    write_weights(tmp_path, {f"w{k}": LazyTensor.of(torch.ones(4)) for k in range(3)}, shard_bytes=16)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lost"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no shard holds: lost"):
        open_weights(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is not a readable"):
        open_weights(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors missing"):
        open_weights(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="is not an index"):
        open_weights(tmp_path)
