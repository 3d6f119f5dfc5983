"""What is checked before a stage starts: its data, tokenizers, model and prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calumma.platform.specification import SpecificationError, Tracking
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing.specification import PREFERENCES, TokenizeSpecification
from calumma.platform.tracking.fingerprints import fingerprints
from calumma.platform.tracking.run import Run
from calumma.platform.training import preparation
from calumma.platform.training.preparation import prepare
from calumma.platform.training.specification import FinetuneSpecification, PretrainSpecification

Stage = Callable[..., PretrainSpecification]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixture": {"tokens/none": 1.0}}, r"mixture: no token shards .*tokens/none; run the job tokenize"),
        ({"held_out": {"x": "tokens/none"}}, r"held_out: no token shards"),
        ({"mixture": {"curated/lines": 1.0}}, r"mixture: .*'curated' without token shards"),
        ({"text_tokenizer": "none"}, r"text_tokenizer: .*run the job train_text_tokenizer"),
        ({"image_tokenizer": "none"}, r"image_tokenizer: .*run the job train_image_tokenizer"),
        (
            {"model": {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "ffn_width": 8, "vocabulary_size": 99}},
            r"has 99 ids, the vocabulary",
        ),
        ({"model": None, "initial": "stages/none"}, r"initial: .*neither a finished stage nor a model directory"),
        ({"samples": ["one " * 200]}, r"samples: the prompt 'one one .* tokens, the model's context is 64"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_the_terms_of_the_specification(
    run: Run, fields: dict[str, Any], said: str, stage: Stage
) -> None:
    with pytest.raises(SpecificationError, match=said):
        prepare(stage(**fields), run)


def test_pairs_without_one_of_two_balanced_modalities_are_told_with_the_first(
    run: Run, stage: Stage, shards_of_its_own: str
) -> None:
    pairs = {"kind": PREFERENCES, "report": {"pairs": 2, "first": "pairs.jsonl: line 1", "trained_text": 8}}
    Manifest.read(shards_of_its_own).model_copy(update=pairs).write(shards_of_its_own)
    balanced = {"preference": {"text_weight": 1.0, "image_weight": 0.5}}
    values = stage(mixture={shards_of_its_own: 1.0}).model_dump(exclude_unset=True) | balanced
    with pytest.raises(SpecificationError, match=r"has a token of image; the first: pairs.jsonl: line 1"):
        prepare(FinetuneSpecification.model_validate(values), run)


# -- token shards and their tokenizers --


def record_tokenizers(uri: str, inputs: dict[str, str], **fields: Any) -> None:
    """Let the token shards' manifest say what they were made with, as the job tokenize does."""
    manifest = Manifest.read(uri)
    spec = TokenizeSpecification.model_validate(manifest.specification | fields)
    specification = spec.model_dump(mode="json")
    manifest.model_copy(update={"inputs": inputs, "specification": specification}).write(uri)


@pytest.fixture
def shards_of_its_own(root: str, tmp_path: Path) -> str:
    shutil.copytree(f"{root}/tokens/pairs", tmp_path / "pairs")
    return str(tmp_path / "pairs")


def test_token_shards_of_another_tokenizer_are_refused(
    root: str, run: Run, shards_of_its_own: str, stage: Stage
) -> None:
    text = f"{root}/tokenizers/text"
    made_with = fingerprints([text])
    spec = stage(mixture={shards_of_its_own: 1.0}, output="stages/none")
    record_tokenizers(shards_of_its_own, made_with)
    prepare(spec, run)
    record_tokenizers(shards_of_its_own, {text: "another fingerprint"})
    with pytest.raises(
        SpecificationError, match=r"pairs were tokenized with another text tokenizer .*run the job tokenize again"
    ):
        prepare(spec, run)
    with pytest.raises(SpecificationError, match=r"held_out: .*another text tokenizer"):
        prepare(stage(held_out={"pairs": shards_of_its_own}, output="stages/none"), run)


def test_token_shards_and_tokenizers_may_have_moved_since(
    root: str, run: Run, shards_of_its_own: str, stage: Stage
) -> None:
    """The tokenizer is known by its fingerprint; where it was then, the specification of then says."""
    spec = stage(mixture={shards_of_its_own: 1.0}, output="stages/none")
    (mark,) = fingerprints([f"{root}/tokenizers/text"]).values()
    record_tokenizers(shards_of_its_own, {"old/tokenizers/text": mark}, storage="old")
    prepare(spec, run)
    record_tokenizers(shards_of_its_own, {"old/tokenizers/text": "another"}, storage="old")
    with pytest.raises(SpecificationError, match="another text tokenizer"):
        prepare(spec, run)
    record_tokenizers(shards_of_its_own, {})  # nothing recorded, nothing to compare
    prepare(spec, run)


def test_metrics_too_many_for_sqlite_are_warned_of(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    spec = stage(steps=600_000, log_every=10)
    assert preparation.warn_of_many_metrics(spec, layers=48) == 60_000 * (28 + 48 * 4)
    assert "some 13,200,000 metric values" in caplog.text
    assert "log_every: 140" in caplog.text
    caplog.clear()
    preparation.warn_of_many_metrics(spec.model_copy(update={"log_every": 140}), layers=48)
    preparation.warn_of_many_metrics(spec.model_copy(update={"tracking": Tracking(uri="http://host:5000")}), layers=48)
    assert not caplog.records
