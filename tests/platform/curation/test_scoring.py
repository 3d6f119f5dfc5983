"""Scores choose and repeat documents. Without a cluster."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image as PILImage

from calumma.model.document import Document
from calumma.platform.curation.steps import scorers
from calumma.platform.curation.steps.scoring import ScorerFailed
from calumma.platform.shards.documents import read_documents
from calumma.platform.specification import SpecificationError

from .conftest import PLUGIN, left_over, png, run, specification, texts_of, write_lines, write_pairs

pytestmark = pytest.mark.usefixtures("plugin")


def test_scores_choose_and_repeat_documents(tmp_path: Path) -> None:
    write_pairs(tmp_path / "raw/pairs/a.tar", [(f"number {n}", png(n)) for n in range(100)])
    sources = [{"name": "pairs", "format": "webdataset", "location": "raw/pairs"}]
    scorer = {
        "factory": f"{PLUGIN}:red",
        "minimum": 20,
        "maximum": 89,
        "upsample": {"above": 69, "times": 2.5},
        "batch": 7,
    }
    manifest, _ = run(specification(tmp_path, sources=sources, scorers={"red": scorer}))
    numbers = Counter(int(text.split()[1]) for text in texts_of(tmp_path, "pairs"))
    assert set(numbers) == set(range(20, 90))
    assert {numbers[n] for n in range(20, 70)} == {1}
    assert {numbers[n] for n in range(70, 90)} == {2, 3}
    report = manifest.report["sources"]["pairs"]
    assert report["dropped"] == {"red below 20": 20, "red above 89": 10}
    assert report["copies"] == sum(numbers.values()) - 70
    assert sum(entry.rows for entry in manifest.files) == sum(numbers.values())
    # Copies stand behind all documents, in the same order of image and caption.
    documents = list(read_documents(f"{tmp_path}/curated/pairs"))
    assert [d.text for d in documents[:70]] == [f"number {n}" for n in range(20, 90)]
    assert set(documents[70:]) < set(documents[:70])
    assert 0 < report["image_first"] < 70


def test_a_fraction_of_copies_is_a_share_of_the_documents() -> None:
    from calumma.model.document import Text
    from calumma.platform.curation.specification import Scorer
    from calumma.platform.curation.steps.scoring import copies

    rules = {
        "a": Scorer.model_validate({"factory": "x:y", "upsample": {"above": 0, "times": 1.3}}),
        "b": Scorer.model_validate({"factory": "x:y", "upsample": {"above": 0, "times": 2}}),
    }
    documents = [Document((Text(f"text {n}"),)) for n in range(1000)]
    assert {copies(d, 0, rules, {"a": 0.0, "b": 1.0}) for d in documents} == {2}
    drawn = Counter(copies(d, 0, rules, {"a": 1.0, "b": 1.0}) for d in documents)
    assert set(drawn) == {2, 3}
    assert abs(drawn[3] / 1000 - 0.6) < 0.08  # five standard deviations
    assert [copies(d, 0, rules, {"a": 1.0}) for d in documents] == [copies(d, 0, rules, {"a": 1.0}) for d in documents]
    assert [copies(d, 0, rules, {"a": 1.0}) for d in documents] != [copies(d, 1, rules, {"a": 1.0}) for d in documents]


@pytest.mark.parametrize(("reduce", "kept"), [("mean", {0, 2}), ("min", {2}), ("max", {0, 1, 2})])
def test_scores_of_a_documents_images_are_reduced(tmp_path: Path, reduce: str, kept: set[int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "raw").mkdir()
    rows = [[png(200), png(50)], [png(150), png(0)], [png(180), png(120)]]
    table = pa.table(
        {
            "texts": [[f"page {n}", None, None] for n in range(3)] + [["page 3"]],
            "images": [[None, *images] for images in rows] + [pa.scalar([None], pa.list_(pa.binary())).as_py()],
        }
    )
    pq.write_table(table, tmp_path / "raw/pages.parquet")
    sources = [{"name": "pages", "format": "interleaved", "location": "raw/pages.parquet"}]
    scorer = {"factory": f"{PLUGIN}:red", "reduce": reduce, "minimum": 110, "batch": 2}
    run(specification(tmp_path, sources=sources, scorers={"red": scorer}))
    # The page without images has no score, and stays.
    assert texts_of(tmp_path, "pages") == [f"page {n}" for n in sorted({*kept, 3})]


@pytest.mark.parametrize(
    ("factory", "said"),
    [("too_few", "gave 2 scores for 3 images"), ("nothing", "gave the score nan; it must be finite")],
)
def test_scorers_that_fail_are_named(tmp_path: Path, factory: str, said: str) -> None:
    write_pairs(tmp_path / "raw/a.tar", [(f"number {n}", png(n)) for n in range(3)])
    sources = [{"name": "pairs", "format": "webdataset", "location": "raw"}]
    spec = specification(tmp_path, sources=sources, scorers={"mine": {"factory": f"{PLUGIN}:{factory}"}})
    with pytest.raises(ScorerFailed, match=rf"scorers\.mine: {PLUGIN}:{factory} {said}"):
        run(spec)
    assert not left_over(tmp_path)


def test_scorers_of_ours_measure_what_they_say() -> None:
    import numpy as np

    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    blurred, flat = noise.resize((4, 4)).resize((64, 64), PILImage.Resampling.BICUBIC), PILImage.new("RGB", (64, 64))
    sharp = scorers.sharpness()([noise, blurred, flat, PILImage.new("RGB", (2, 2))])
    assert sharp[0] > 100 * sharp[1] > sharp[2] == sharp[3] == 0
    colour = scorers.colourfulness()([noise, noise.convert("L").convert("RGB"), PILImage.new("RGB", (9, 9), "red")])
    assert colour[0] > 80
    assert colour[1] == 0
    assert abs(colour[2] - 0.3 * np.hypot(255, 127.5)) < 1e-9
    from calumma.model.document import Text

    prose, again = Document((Text(json.__doc__ or ""),)), Document((Text("buy now " * 200),))
    ratios = scorers.compressibility()([prose, again, Document(())])
    assert ratios[0] < 4 < 20 < ratios[1]
    assert ratios[2] == 0


def test_scorers_that_the_cluster_has_no_room_for_are_told_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "raw/a.jsonl", ["one"])
    sources = [{"name": "texts", "format": "jsonl", "location": "raw"}]
    scorer = {"factory": f"{PLUGIN}:length", "of": "documents", "resources": {"workers": 50_000}}
    spec = specification(tmp_path, sources=sources, scorers={"big": scorer}, resources={"workers": 1})
    with pytest.raises(SpecificationError, match=r"50,?000"):
        run(spec)
