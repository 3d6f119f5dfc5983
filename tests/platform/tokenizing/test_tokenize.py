"""Tokenizing as a job: what is made again, refused, and told. What happens to one that is killed is in
test_tokenize_restart.py. Nothing here needs a cluster (`resources.workers: 0`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.config import ImageTokenizerConfig
from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import SpecificationError, validate
from calumma.platform.storage.manifest import Manifest
from calumma.platform.tokenizing import tokenize
from calumma.platform.tokenizing.actor import UnusableDocuments
from calumma.platform.tokenizing.specification import TokenizeSpecification

from .conftest import CODES, curated, documents_in, files_below, pair, publish, rows_of, run, tokenization


def test_tokens_are_the_same_for_one_seed_and_others_for_another(tmp_path: Path, tokenizers: Path) -> None:
    curated(tmp_path)
    outputs = []
    for output, seed in (("one", 0), ("two", 0), ("three", 1)):
        run(tokenization(tmp_path, tokenizers, documents=["curated/pairs"], output=output, seed=seed))
        outputs.append(rows_of(f"{tmp_path}/{output}/pairs"))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]
    assert sorted(documents_in(outputs[0])) == sorted(documents_in(outputs[2]))


def test_only_directories_whose_documents_changed_are_tokenized_again(
    tmp_path: Path, worked: list[str], tokenizers: Path
) -> None:
    curated(tmp_path)
    first, _ = run(tokenization(tmp_path, tokenizers))
    worked.clear()
    assert run(tokenization(tmp_path, tokenizers))[0] == first
    assert worked == []
    publish(f"{tmp_path}/curated/text", [Document((Text("number 5"),))])
    run(tokenization(tmp_path, tokenizers))
    assert worked == ["text"]
    assert len(files_below(tmp_path / "tokens/text")) == 2  # the shard and the manifest: what it replaced is gone


def test_a_context_shorter_than_an_image_is_refused_before_any_work(
    tmp_path: Path, worked: list[str], tokenizers: Path
) -> None:
    curated(tmp_path)
    with pytest.raises(SpecificationError, match=r"context: 16 is too short for the 18 tokens .* 60 images; .* 17"):
        run(tokenization(tmp_path, tokenizers, context=16))
    run(tokenization(tmp_path, tokenizers, context=16, documents=["curated/text"]))
    assert worked == ["text"]


def test_missing_or_unequal_tokenizers_and_documents_are_named(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])

    def refused(**fields: Any) -> str:
        with pytest.raises(SpecificationError) as error:
            run(tokenization(tmp_path, tokenizers, **{"documents": ["curated/a"], **fields}))
        return str(error.value)

    assert "run the job train_text_tokenizer first" in refused(text_tokenizer="nowhere")
    assert "run the job train_image_tokenizer first" in refused(image_tokenizer="nowhere")
    assert "run the job curate for them first" in refused(documents=["curated/b"])
    config = ImageTokenizerConfig(resolution=8, codebook_size=CODES + 1, multipliers=[1, 1])
    (tmp_path / "other").mkdir()
    config.save(tmp_path / "other")
    assert "has ids for 8 image codes, and the image tokenizer" in refused(image_tokenizer="other")
    assert "window: Input should be greater than or equal to 1 (given 0)" in refused(window=0)


def test_only_jobs_that_can_do_without_a_cluster_may_ask_for_no_workers(tmp_path: Path) -> None:
    from calumma.jobs.specifications.table import JOBS
    from calumma.platform.tokenizing.specification import TextTokenizerSpecification

    values = {"storage": str(tmp_path), "documents": ["a"], "resources": {"workers": 0}}
    assert validate(TokenizeSpecification, values, "the test").resources.max_workers == 0
    with pytest.raises(
        SpecificationError, match=r"is for curate, tokenize, .* alone; give train_text_tokenizer at least 1"
    ):
        validate(TextTokenizerSpecification, values, "the test")
    assert {"curate", "tokenize"} < set(JOBS)


def test_tokens_are_not_taken_for_documents(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [Document((Text("number 1"),))])
    run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    with pytest.raises(SpecificationError, match="holds 'tokens', not curated documents"):
        next(read_documents(f"{tmp_path}/tokens/a"))


def test_documents_that_all_are_too_long_are_an_error(tmp_path: Path, tokenizers: Path) -> None:
    endless = Document((Text("number 1", "user"), Text("more words " * 90, "assistant")))
    publish(f"{tmp_path}/curated/a", [endless])
    with pytest.raises(UnusableDocuments, match="1 conversation longer than the context"):
        run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))
    assert Manifest.find(f"{tmp_path}/tokens/a") is None


def test_documents_that_cannot_be_encoded_are_named_by_their_shard(tmp_path: Path, tokenizers: Path) -> None:
    publish(f"{tmp_path}/curated/a", [pair(1), Document((Image(b"no image"),))])
    with pytest.raises(
        UnusableDocuments, match=r"a/documents-0000\.parquet: .* not a readable image.*; curate it again"
    ):
        run(tokenization(tmp_path, tokenizers, documents=["curated/a"]))


def test_documents_and_tokens_may_be_in_s3(tmp_path: Path, tokenizers: Path, s3: str) -> None:
    curated(s3)
    storage.upload(tokenizers, f"{s3}/tokenizers")
    tokenized = {"text_tokenizer": "tokenizers/text", "image_tokenizer": "tokenizers/image"}
    manifest, _ = run(tokenization(s3, tokenizers, **tokenized))
    manifest.verify(f"{s3}/tokens", content=True)
    assert len(storage.list_files(f"{s3}/tokens")) == len(manifest.files) + 3  # manifests; no receipt is left
    curated(tmp_path)
    local, _ = run(tokenization(tmp_path, tokenizers))
    assert [entry.sha256 for entry in manifest.files] == [entry.sha256 for entry in local.files]


@given(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 3000), st.integers(0, 9))
def test_windows_deal_every_shard_once(count: int, rows: int, size: int, seed: int) -> None:
    uris = [str(n) for n in range(count)]
    dealt = tokenize.windows(uris, count * rows, size, seed)
    assert sorted(uri for window in dealt for uri in window) == sorted(uris)
    assert all(dealt)
    assert len(dealt) == min(count, max(1, count * rows // size))
