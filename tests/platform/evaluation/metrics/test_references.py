"""Metrics equal what their publishers' own programs gave, run once; what they gave is in `values/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from calumma.platform.evaluation.metrics import captions, pictures, questions

VALUES = Path(__file__).parent / "values"


def values(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((VALUES / f"{name}.json").read_text())
    return content


def test_cider_bleu_and_rouge_are_pycocoevalcaps() -> None:
    """Of the words as Stanford's tokenizer divided them: the measures alone."""
    known = values("captions")
    items = known["items"]
    found = captions.score_words([item["words"] for item in items], [item["reference_words"] for item in items])
    assert found.cider == pytest.approx(known["cider"], abs=1e-6)
    assert found.ciders == pytest.approx([item["cider"] for item in items], abs=1e-6)
    assert found.bleus == pytest.approx(known["bleu"], abs=1e-6)
    assert found.rouges == pytest.approx([item["rouge_l"] for item in items], abs=1e-6)


def test_captions_are_divided_as_stanfords_tokenizer_divides_them() -> None:
    items = values("captions")["items"]
    for item in items:
        assert captions.words_of(item["caption"]) == item["words"], item["caption"]
        for text, words in zip(item["references"], item["reference_words"], strict=True):
            assert captions.words_of(text) == words, text
    found = captions.score([item["caption"] for item in items], [item["references"] for item in items])
    assert found.cider == pytest.approx(values("captions")["cider"], abs=1e-6)


def test_vqa_accuracy_is_its_publishers() -> None:
    for item in values("vqa")["items"]:
        assert questions.vqa_answer(item["answer"]) == item["normal"].replace("’", "'")
        assert questions.vqa_accuracy(item["answer"], item["people"]) == pytest.approx(item["accuracy"], abs=1e-9)


def test_psnr_ssim_and_the_frechet_distance_are_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torchmetrics.functional.image")
    random = np.random.default_rng(0)
    one = PILImage.fromarray(random.integers(0, 255, (40, 32, 3), np.uint8))
    other = PILImage.blend(one, PILImage.new("RGB", one.size, (90, 140, 20)), 0.3)
    a, b = pictures.pixels(one), pictures.pixels(other)
    first, second = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (a, b))
    peak = float(metrics.peak_signal_noise_ratio(first, second, data_range=1.0))
    assert pictures.psnr(a, b) == pytest.approx(peak, abs=1e-6)
    similar = float(metrics.structural_similarity_index_measure(first, second, data_range=1.0))
    assert pictures.ssim(a, b) == pytest.approx(similar, abs=1e-6)
    frechet = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    x, y = random.normal(size=(60, 8)), random.normal(0.5, 2, size=(50, 8))
    moments = [(torch.from_numpy(v.mean(0)), torch.from_numpy(np.cov(v, rowvar=False))) for v in (x, y)]
    expected = float(frechet(moments[0][0], moments[0][1], moments[1][0], moments[1][1]))
    assert pictures.frechet(x, y) == pytest.approx(expected, abs=1e-6)
