"""What a curation found: the same however documents were dealt to tasks, and drawn without losing any."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Text
from calumma.platform.curation.report.drawing import histogram, number, ticks
from calumma.platform.curation.report.findings import (
    KEPT,
    SAMPLES,
    SAMPLES_A_REASON,
    Findings,
    bin_middle,
    bin_of,
)
from calumma.platform.curation.report.page import Part, page
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


counts = st.dictionaries(st.integers(-900, 1500), st.integers(1, 1000), max_size=30)


@given(counts, counts)
def test_a_histogram_shows_every_value_within_its_frame(kept: dict[int, int], dropped: dict[int, int]) -> None:
    drawn = histogram(kept, dropped)
    if not kept and not dropped:
        assert drawn == ""
        return
    told = re.findall(r": ([\d,]+) kept, ([\d,]+) dropped", drawn)
    assert sum(int(k.replace(",", "")) for k, _ in told) == sum(kept.values())
    assert sum(int(d.replace(",", "")) for _, d in told) == sum(dropped.values())
    for y, height in re.findall(r'y="([\d.-]+)" width="[\d.]+" height="([\d.]+)"', drawn):
        assert 0 <= float(y) <= 150
        assert float(height) > 0


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width, logarithmic=False)
    assert 2 <= len(found) <= 7
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


@given(st.floats(1e-6, 1e6), st.floats(12, 1e9))
def test_logarithmic_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    found = ticks(low, low * ratio, logarithmic=True)
    assert 1 <= len(found) <= 7
    assert all(low <= tick <= low * ratio for tick in found)


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.25, 12, 1500, 12_000, 3_000_000, 2.5e9)] == [
        "0",
        "0.25",
        "12",
        "1500",
        "12k",
        "3M",
        "2.5G",
    ]


def test_a_page_is_made_of_nothing_known() -> None:
    report = {"read": 0, "kept": 0, "bad": 0, "bad_inputs": [], "images": 0, "characters": 0}
    drawn = page([Part("empty", report, Findings())])
    assert "Nothing is known of what an earlier run kept" in drawn
    assert drawn.endswith("</html>\n")


def test_names_and_texts_cannot_become_markup() -> None:
    findings = Findings()
    evil = Document((Text("<img src=x onerror=alert(1)>"),), metadata={"name": "<sub>.jsonl", "language": "<var>"})
    findings.keep(evil)
    findings.drop(evil, Dropped("caption has <u>", "captions"))
    bad = [{"name": "<s>", "reason": "<em>"}]
    report = {"read": 2, "kept": 1, "bad": 1, "bad_inputs": bad, "images": 0, "characters": 9}
    drawn = page([Part("a", report, findings)])
    assert not re.search(r"<(img src=x|sub>|var>|u>|s>|em>)", drawn)
    assert "&lt;img src=x onerror=alert(1)&gt;" in drawn
