"""Metrics by examples worked out by hand, and what holds for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.platform.evaluation.benchmarks import safety
from calumma.platform.evaluation.benchmarks.items import Graded, measured
from calumma.platform.evaluation.metrics import captions, intervals, pictures, questions

WORDS = st.lists(st.sampled_from("a red blue square lies on the".split()), min_size=1, max_size=9)  # noqa: SIM905


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_a_caption_that_is_a_reference_is_the_best_one(words: list[str], others: list[list[str]]) -> None:
    assert captions.rouge_l(words, [words, *others]) == pytest.approx(1)
    assert captions.bleu([words], [[words, *others]])[0] == pytest.approx(1, abs=1e-6)
    assert captions.rouge_l(words, others) <= 1 + 1e-9


def test_squad_is_exact_but_for_case_articles_and_punctuation() -> None:
    assert questions.squad_exact("The Eiffel Tower.", ["eiffel tower"]) == 1
    assert questions.squad_exact("towers", ["tower"]) == 0
    assert questions.squad_exact("", []) == 1
    assert questions.squad_f1("a tall tower", ["tower of iron"]) == pytest.approx(2 * 0.5 * (1 / 3) / (0.5 + 1 / 3))
    assert questions.squad_f1("something", []) == 0


def test_wilsons_interval() -> None:
    """Of 8 of 10, as R's prop.test(8, 10, correct = FALSE) tells."""
    assert intervals.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert intervals.wilson(0, 12).low == 0
    assert intervals.wilson(0, 12).high > 0.2
    with pytest.raises(ValueError, match="no share"):
        intervals.wilson(0, 0)


def test_what_is_no_share_has_no_interval_of_a_share() -> None:
    """A dozen captions with nothing of their references: Wilson would say that CIDEr is below 0.25 of a bound that it
    has not."""
    nothing = captions.score(["xyzzy"] * 12, [["a red square"]] * 12)
    found = measured([Graded({"cider": c, "rouge_l": r}, "", "") for c, r in zip(*nothing[3:], strict=True)])
    assert found.values["cider"] == [0.0] * 12
    assert found.interval("cider") is None
    assert found.interval("rouge_l") == intervals.wilson(0, 12)
    mixed = measured([Graded({"cider": value}, "", "") for value in (0.0, 1.0, 0.0, 1.0)])
    assert mixed.interval("cider") == intervals.bootstrap([0.0, 1.0, 0.0, 1.0])
    assert intervals.compare([0.0] * 9, [1.0] * 9, shares=False).test == "permutation test"


def test_mcnemar_is_the_fair_coins() -> None:
    """R: binom.test(2, 10)$p.value."""
    assert intervals.mcnemar(8, 2) == pytest.approx(0.109375)
    assert intervals.mcnemar(0, 0) == 1


def test_a_difference_in_every_item_is_seen_and_none_is_not() -> None:
    better = intervals.compare([0.1] * 30, [0.4] * 30)
    assert better.difference == pytest.approx(0.3)
    assert better.p < 0.01
    assert intervals.compare([0.2, 0.9, 0.4], [0.2, 0.9, 0.4]).p == 1
    assert intervals.compare([1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]).test.startswith("McNemar")


def test_a_model_that_always_draws_the_same_is_seen() -> None:
    same = [PILImage.new("RGB", (16, 16), (9, 9, 9))] * 4
    other = [PILImage.new("RGB", (16, 16), (value, 0, 0)) for value in (0, 80, 160, 240)]
    assert (pictures.diversity(same), pictures.distinct(same)) == (0, 0.25)
    assert pictures.diversity(other) > 0.1
    assert pictures.distinct(other) == 1


def test_judges_are_counted_and_compared() -> None:
    verdicts = {"a": ["safe", "unsafe", "safe", "unsafe"], "b": ["safe", "safe", "safe", "unsafe"]}
    found = safety.agreement(verdicts)
    assert found["agree_a_b"] == 0.75
    assert found["kappa_a_b"] == pytest.approx(0.5)
    assert safety.majority(["safe", "unsafe"]) == "unsure"
    assert safety.majority(["safe", "unsafe", "unsafe"]) == "unsafe"


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I cannot assist with this.", True), ("", True),
        ("Press Ctrl-C, or kill its id.", False), ("Sorry to hear that! Try a warmer room.", False),
    ],
)  # fmt: skip
def test_refusals_are_told_from_answers(answer: str, refused: bool) -> None:
    assert safety.refuses(answer) is refused
