"""The job tokenize_preferences: pairs side by side in rows, prompts on one side, faults told by their first line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calumma.model.config import ImageTokenizerConfig
from calumma.model.encoding import EncodedArrays
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text_training import train_text_tokenizer
from calumma.platform.cluster.progress import no_progress
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.preferences import EncodedPair, WrongPairs, pack_pairs, run
from calumma.platform.tokenizing.specification import PreferenceTokensSpecification


class NoRun:
    id = "none"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...


def side(length: int, value: int) -> EncodedArrays:
    trained = np.zeros(length, np.bool_)
    trained[length // 2 :] = True
    return EncodedArrays(np.full(length, value, np.int32), trained)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=20))
def test_both_sides_of_a_pair_have_one_place_in_rows_that_follow_each_other(lengths: list[tuple[int, int]]) -> None:
    pairs = [EncodedPair(side(a, 2 * n + 10), side(b, 2 * n + 11)) for n, (a, b) in enumerate(lengths)]
    rows = pack_pairs(pairs, 20, pad=0)
    found = []
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        assert chosen.segments.max() == rejected.segments.max()
        for number in range(chosen.segments.max() + 1):
            a, b = chosen.tokens[chosen.segments == number], rejected.tokens[rejected.segments == number]
            assert len(set(a)) == len(set(b)) == 1
            assert b[0] == a[0] + 1
            found.append((len(a), len(b)))
    assert sorted(found) == sorted(lengths)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_text_tokenizer(["Question 1 2 3? answer 4 none " * 20], folder, vocabulary_size=300, image_codes=16)
    shape = ImageTokenizerConfig(
        resolution=8, codebook_size=16, embedding=8, base_channels=8, multipliers=[1, 1], residual_blocks=1
    )
    ImageTokenizer(shape).save(folder / "image_tokenizer")
    return folder


def specification(folder: Path, tokenizers: Path, **fields: Any) -> PreferenceTokensSpecification:
    places = {"text_tokenizer": str(tokenizers), "image_tokenizer": str(tokenizers / "image_tokenizer")}
    return PreferenceTokensSpecification(
        storage=str(folder), location="pairs.jsonl", context=64, micro_batch=4, **places, **fields
    )


def test_pairs_become_shards_and_their_prompts_stay_on_one_side(tmp_path: Path, tokenizers: Path) -> None:
    pairs = [{"prompt": f"Question {n % 10}?", "chosen": f"answer {n}", "rejected": "none"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    manifest = run(specification(tmp_path, tokenizers, held_out=0.3), NoRun(), no_progress)  # type: ignore[arg-type]
    assert manifest.report["pairs"] == 40
    sides = {part: Manifest.read(f"{tmp_path}/preferences/{part}") for part in ("train", "held_out")}
    assert sum(each.report["pairs"] for each in sides.values()) == 40
    assert all(each.report["pairs"] % 4 == 0 for each in sides.values())  # four pairs have each prompt
    assert any(each.report["first"].endswith("line 1") for each in sides.values())
    for part, each in sides.items():
        rows = pq.read_table(f"{tmp_path}/preferences/{part}/{each.files[0].path}").to_pylist()
        assert len(rows) % 2 == 0
        assert all(len(row["tokens"]) == 65 for row in rows)
        assert sum(sum(row["loss_mask"]) for row in rows) == each.report["trained_text"]


def test_too_many_wrong_pairs_end_the_job_with_the_first(tmp_path: Path, tokenizers: Path) -> None:
    good = {"prompt": "Question?", "chosen": "answer", "rejected": "none"}
    bad, long = {**good, "rejected": "answer"}, {**good, "chosen": "answer " * 200}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in (good, bad, long, bad)))
    with pytest.raises(WrongPairs) as told:
        run(specification(tmp_path, tokenizers), NoRun(), no_progress)  # type: ignore[arg-type]
    message = str(told.value)
    assert "3 of 4 pairs are wrong, more than max_bad_share 0.01 allows" in message
    assert "2 are wrong: the chosen and the rejected answer are equal; the first: " in message
    assert "longer than the context of 64 tokens; the first: " in message
    manifest = run(specification(tmp_path, tokenizers, max_bad_share=0.8), NoRun(), no_progress)  # type: ignore[arg-type]
    assert manifest.report["pairs"] == 1
