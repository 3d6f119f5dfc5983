"""Losses on held-out token shards: means over all trained tokens, of shards that are what their manifest says."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform import storage
from calumma.platform.shards import row_groups
from calumma.platform.shards.row_groups import RowGroupReader, ShardError, all_micro_batches
from calumma.platform.storage.manifest import Manifest
from calumma.platform.training.steps import held_out


class Engine:
    """A stand-in for DeepSpeed's in evaluation: a plain module with a device."""

    device = torch.device("cpu")

    def __init__(self, module: Transformer) -> None:
        self.module, self.shared = module, module.shared

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.module(*given, **named)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


@pytest.fixture(scope="module")
def vocabulary(root: str) -> Vocabulary:
    return Vocabulary.read(f"{root}/tokenizers/text")


@pytest.fixture(scope="module")
def image_mask_V(vocabulary: Vocabulary) -> torch.Tensor:
    return vocabulary.mask(vocabulary.image_ids)


@pytest.fixture(scope="module")
def transformer(shape: ModelConfig, vocabulary: Vocabulary) -> Transformer:
    """Its attention stays within documents; dropout is strong, and must be off. Its weights are large: what a token
    sees shows in the loss."""
    fields = {"vocabulary_size": vocabulary.size, "dropout": 0.5, "mask_documents": True}
    found = Transformer(shape.model_copy(update=fields)).initialize(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
    return found


@pytest.fixture(autouse=True)
def no_footers_of_other_tests() -> None:
    row_groups._footer_cache.cache_clear()


def by_hand(transformer: Transformer, uri: str, image_mask_V: torch.Tensor) -> dict[str, float]:
    """The mean losses, with pyarrow alone and every document in a forward pass of its own."""
    transformer.eval()
    total, number = Counter[str](), Counter[str]()
    for file in sorted(Path(uri).glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            tokens, segments = torch.tensor(row["tokens"]), torch.tensor(row["segments"])
            trained = torch.tensor(row["loss_mask"] or [True] * len(tokens)) & (segments >= 0)
            for document in range(int(segments.max()) + 1):
                (places,) = torch.nonzero(segments[:-1] == document, as_tuple=True)
                targets, counted = tokens[places + 1], trained[places + 1]
                with torch.no_grad():
                    logits = transformer(tokens[places][None])[0].double()
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                for name, chosen in (("image", image_mask_V[targets]), ("text", ~image_mask_V[targets])):
                    total[name] += float(losses[chosen & counted].sum())
                    number[name] += int((chosen & counted).sum())
    found = {f"loss_{name}": total[name] / number[name] for name in number if number[name]}
    return found | {"loss": total.total() / number.total()}


@pytest.mark.parametrize("name", ["pairs", "lines"])
def test_the_held_out_loss_is_the_mean_over_all_trained_tokens(
    root: str, transformer: Transformer, image_mask_V: torch.Tensor, name: str
) -> None:
    """Of every document as if it were alone, though several share a row."""
    uri = f"{root}/tokens/{name}"
    segments = held_out.read_row_group(RowGroupReader(), all_micro_batches(uri, Manifest.read(uri))[0]).segments
    assert segments.max() > 0
    beats: list[int] = []
    found = held_out.measure(Engine(transformer), uri, image_mask_V, 0, 1, lambda: beats.append(1))
    assert transformer.training  # again
    assert found == pytest.approx(by_hand(transformer, uri, image_mask_V), rel=1e-5)
    assert ("loss_image" in found) == (name == "pairs")
    assert len(beats) == Manifest.read(uri).row_groups  # the watchdog hears of every forward pass


def test_workers_measure_a_share_each_with_as_many_forward_passes(
    root: str, transformer: Transformer, image_mask_V: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five workers, one after the other here: what all_reduce is to add up gives the loss of one worker."""
    uri, sums, beats = f"{root}/tokens/pairs", list[torch.Tensor](), Counter[int]()
    monkeypatch.setattr(held_out, "sum_over_workers", lambda local: sums.append(local) or local)
    for rank in range(5):
        held_out.measure(Engine(transformer), uri, image_mask_V, rank, 5, lambda rank=rank: beats.update([rank]))
    assert set(beats.values()) == {-(-Manifest.read(uri).row_groups // 5)}
    assert len({tuple(each.tolist()) for each in sums}) == 5
    expected = held_out.measure(Engine(transformer), uri, image_mask_V, 0, 1)
    text_nll, text, image_nll, image = torch.stack(sums[:5]).sum(dim=0).tolist()
    assert held_out.mean_losses(text_nll, text, image_nll, image) == pytest.approx(expected, rel=1e-6)


def test_shards_in_s3_give_the_same_losses(
    root: str, s3: str, transformer: Transformer, image_mask_V: torch.Tensor, tmp_path: Path
) -> None:
    """To the last bit, read by ranges or from copies on a local disk."""
    for file in Path(root, "tokens/pairs").iterdir():
        storage.write_bytes(f"{s3}/held-out/{file.name}", file.read_bytes())
    here = held_out.measure(Engine(transformer), f"{root}/tokens/pairs", image_mask_V, 0, 1)
    reader = RowGroupReader(cache=row_groups.ShardCache(tmp_path, 1 << 20))
    for given in (RowGroupReader(), reader):
        assert held_out.measure(Engine(transformer), f"{s3}/held-out", image_mask_V, 0, 1, reader=given) == here
    assert list(tmp_path.glob("*.shard"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_damaged_held_out_shard_is_named_with_its_row_group(
    root: str, request: pytest.FixtureRequest, transformer: Transformer, image_mask_V: torch.Tensor, place: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One flipped bit of its tokens: the loss would hardly differ."""
    uri = str(tmp_path / "held-out")
    shutil.copytree(f"{root}/tokens/pairs", uri)
    if place == "s3":
        uri = f"{request.getfixturevalue('s3')}/held-out"
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    (entry,) = Manifest.read(str(tmp_path / "held-out")).files
    data = bytearray((tmp_path / "held-out" / entry.path).read_bytes())
    metadata = pq.read_metadata(tmp_path / "held-out" / entry.path)
    column = metadata.row_group(metadata.num_row_groups - 2).column(0)
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 4
    for file in (tmp_path / "held-out").iterdir():
        storage.write_bytes(f"{uri}/{file.name}", bytes(data) if file.name == entry.path else file.read_bytes())
    named = rf"^{uri}/{entry.path}: row group {metadata.num_row_groups - 2} has checksum .* write the shard again"
    with pytest.raises(ShardError, match=named):
        held_out.measure(Engine(transformer), uri, image_mask_V, 0, 1)


def test_shards_that_are_not_published_are_no_held_out_data(
    tmp_path: Path, transformer: Transformer, image_mask_V: torch.Tensor
) -> None:
    with pytest.raises(storage.NotFound, match=r"none/manifest\.json"):
        held_out.measure(Engine(transformer), f"{tmp_path}/none", image_mask_V, 0, 1)
