"""What a curation found: the same however documents were dealt to tasks, and drawn without losing any."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Text
from calumma.platform.curation.report.findings import (
    KEPT,
    SAMPLES,
    SAMPLES_A_REASON,
    Findings,
    bin_middle,
    bin_of,
)
from calumma.platform.curation.report.page import BAD_SHOWN, Part, page
from calumma.platform.curation.steps.filters import Dropped

REASONS = (None, Dropped("too short", "texts"), Dropped("too long", "texts"), Dropped("exact duplicate", "duplicates"))


def take(findings: Findings, index: int, why: Dropped | None) -> None:
    document = Document((Text("x" * (index + 1)),), metadata={"name": f"a.jsonl: line {index}", "language": "en"})
    if why is None:
        findings.keep(document, {"quality": index - 20.0})
    else:
        findings.drop(document, why, like=index if why.step == "duplicates" else None)


@given(st.lists(st.sampled_from(REASONS), max_size=60), st.integers(1, 5), st.integers(0, 9))
def test_findings_add_up_whatever_the_tasks(reasons: list[Dropped | None], tasks: int, seed: int) -> None:
    whole = Findings()
    parts = [Findings() for _ in range(tasks)]
    chosen = random.Random(seed)
    for index, why in enumerate(reasons):
        take(whole, index, why)
        take(chosen.choice(parts), index, why)
    together = Findings()
    for part in parts:
        together.add(Findings.model_validate_json(part.model_dump_json()))
    assert together == whole
    assert sum(sum(counts.values()) for counts in whole.steps.values()) == sum(why is not None for why in reasons)
    for key, samples in whole.samples.items():
        assert 0 < len(samples) <= SAMPLES.get(key, SAMPLES_A_REASON)
    assert len(whole.samples.get(KEPT, [])) == min(12, reasons.count(None))


@given(st.floats(-1e12, 1e12))
def test_a_bin_is_two_percent_wide(value: float) -> None:
    middle = bin_middle(bin_of(value))
    assert abs(middle - value) <= 0.0101 * abs(value) + 1e-6


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_bins_are_in_the_order_of_their_values(one: float, two: float) -> None:
    assert (bin_of(one) <= bin_of(two)) or one > two


def test_a_page_is_made_of_nothing_known() -> None:
    report = {"read": 0, "kept": 0, "bad": 0, "bad_inputs": [], "images": 0, "characters": 0}
    drawn = page([Part("empty", report, Findings())])
    assert "Nothing is known of what an earlier run kept" in drawn
    assert drawn.endswith("</html>\n")


def test_a_page_says_what_was_found() -> None:
    findings = Findings(seconds={"texts": 2.0, "scrub": 3.0}, marks={"<EMAIL>": 1}, images_removed=3)
    for index in range(20):
        take(findings, index, REASONS[index % len(REASONS)])
    findings.scrubbed(Document((Text("write to <EMAIL> soon"),), metadata={"name": "b.jsonl: line 1"}))
    [first, *_] = findings.samples["duplicates: exact duplicate"]
    first.other = findings.samples[KEPT][0]
    bad = [{"name": f"{n}.jsonl", "reason": "torn"} for n in range(BAD_SHOWN + 5)]
    report = {"read": 20, "kept": 5, "bad": 1234, "bad_inputs": bad, "images": 0, "characters": 99, "copies": 7}
    other = {"read": 0, "kept": 0, "bad": 0, "bad_inputs": [], "images": 0, "characters": 0}
    drawn = page([Part("mine", report, findings), Part("other", other, Findings())])
    for words in (
        "2 sources: mine, other.",
        "<b>20</b><span>documents read</span>",
        "<b>5</b><span>kept, 25.0%</span>",
        "<b>15</b><span>dropped, 75.0%</span>",
        "images kept, 3 taken out of pages",
        "<b>7</b><span>copies added by score</span>",
        '<tr class="reason"><td>too short</td><td class="number">5</td><td class="number none">·</td>',
        "Time, of all processes together: Scrub 3.0 s, Texts 2.0 s.",
        "Score quality",
        "write to <mark>&lt;EMAIL&gt;</mark> soon",
        "<h4>Texts: too long (5)</h4>",
        '<div class="like">like an earlier document</div>',
        f'<div class="like">like {first.other.name}',
        "quality -20 · a.jsonl: line 0",
        "Unreadable <small>1,234 inputs</small>",
        "<li>49.jsonl: torn</li>",
        "<li>and 1,184 more</li>",
    ):
        assert words in drawn
    assert drawn.count("<svg ") == 4  # lengths and scores, of all sources and of the one that has any
    assert "<li>50.jsonl" not in drawn


def test_names_and_texts_cannot_become_markup() -> None:
    findings = Findings()
    evil = Document((Text("<img src=x onerror=alert(1)>"),), metadata={"name": "<sub>.jsonl", "language": "<var>"})
    findings.keep(evil)
    findings.drop(evil, Dropped("caption has <u>", "captions"))
    bad = [{"name": "<s>", "reason": "<em>"}]
    report = {"read": 2, "kept": 1, "bad": 1, "bad_inputs": bad, "images": 0, "characters": 9}
    drawn = page([Part("<script>", report, findings), Part("b", report, findings)])
    assert not re.search(r"<(img src=x|sub>|var>|u>|s>|em>|script)", drawn)
    assert "&lt;img src=x onerror=alert(1)&gt;" in drawn
