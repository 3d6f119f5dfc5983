"""Charts: every value is drawn, within the frame, under axes with few and round numbers and labels apart."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.platform.reports.charts import LETTER, TINY, Axis, Series, histogram, line_chart, number, ticks

COLOURS = {"kept": "green", "dropped": "red"}
counts = st.dictionaries(st.floats(-1e9, 1e9), st.integers(1, 1000), max_size=30)
values = st.floats(-1e9, 1e9)
curves = st.lists(st.tuples(st.integers(0, 100_000).map(float), st.floats()), max_size=12)


# -- axes


@given(st.lists(values, min_size=1, max_size=9), st.data())
def test_an_axis_holds_its_values_and_places_turn_back(known: list[float], data: st.DataObject) -> None:
    axis = Axis.over(known)
    value = data.draw(st.sampled_from(known))
    assert -1e-6 <= axis.place(value) <= 100 + 1e-6
    assert axis.value(axis.place(value)) == pytest.approx(value, rel=1e-6, abs=1e-6 * (axis.high - axis.low))


def test_an_axis_is_logarithmic_where_values_are_far_apart() -> None:
    assert not Axis.over([1, 12]).logarithmic
    assert Axis.over([1, 13]).logarithmic
    assert not Axis.over([0, 13]).logarithmic
    assert Axis.over([1, 13]).place(math.sqrt(13)) == pytest.approx(50)
    assert Axis.over([3]).place(3) == pytest.approx(50)
    assert Axis.over([0.031, 0.033], logarithmic=True).ticks()  # no power of ten within


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
    given_, short = (0, 0.25, 12, 1500, 12_000, 3_000_000, 2.5e9), ["0", "0.25", "12", "1500", "12k", "3M", "2.5G"]
    assert [number(value) for value in given_] == short


# -- histograms


@given(counts, counts)
def test_a_histogram_counts_every_value_within_its_frame(kept: dict[float, int], dropped: dict[float, int]) -> None:
    drawn = histogram({"kept": kept, "dropped": dropped}, COLOURS)
    if drawn is None:
        assert not kept
        assert not dropped
        return
    told = [bar.title.partition(": ")[2].replace(",", "").split() for bar in drawn.bars]
    assert sum(int(words[0]) for words in told) == sum(kept.values())
    assert sum(int(words[2]) for words in told) == sum(dropped.values())
    assert max(int(words[0]) + int(words[2]) for words in told) == drawn.tallest
    for bar in drawn.bars:
        assert 0 <= bar.left < bar.left + bar.width <= 100
        assert min(piece.top for piece in bar.pieces) >= 0
        assert all(piece.height > 0 for piece in bar.pieces)
        assert bar.pieces[0].top + bar.pieces[0].height == pytest.approx(100)
    assert all(-1e-6 <= tick.place <= 100 + 1e-6 for tick in drawn.ticks)


# -- lines


@given(curves, curves, st.booleans())
def test_lines_stay_in_their_frame_and_skip_what_is_no_number(
    one: list[tuple[float, float]], two: list[tuple[float, float]], logarithmic: bool
) -> None:
    sound = [(x, y if abs(y) < 1e12 else math.nan) for x, y in (*one, *two)]
    pieces = [sound[: len(one)], sound[len(one) :]]
    chart = line_chart([Series("text", "blue", pieces)], logarithmic=logarithmic)
    drawable = [y for _, y in sound if math.isfinite(y) and (y > TINY or not logarithmic)]
    if chart is None:
        assert not drawable
        return
    points = [tuple(map(float, point.split(","))) for line in chart.lines for point in line.points.split()]
    assert len(points) >= len(drawable)
    assert all(-0.01 <= share <= 100.01 for point in points for share in point)
    assert all(-0.01 <= tick.place <= 100.01 for tick in (*chart.along, *chart.up))


def test_larger_values_stand_higher() -> None:
    chart = line_chart([Series("loss", "blue", [[(0, 4.0), (10, 1.0)]])])
    assert chart is not None
    assert chart.lines[0].points == "0.00,4.76 100.00,76.19"
    assert [(tick.label, round(tick.place)) for tick in chart.along] == [
        ("0", 0), ("2", 20), ("4", 40), ("6", 60), ("8", 80), ("10", 100),
    ]  # fmt: skip
    assert [tick.label for tick in chart.up] == ["0", "1", "2", "3", "4"]
    assert chart.bands == []
    assert chart.rows == 0


def test_a_single_value_is_a_point() -> None:
    chart = line_chart([Series("loss", "blue", [[(5, 2.0)], []])])
    assert chart is not None
    assert [line.points for line in chart.lines] == ["100.00,4.76 100.00,4.76"]


@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=25), st.integers(0, 900)), min_size=1, max_size=6),
)
def test_labels_of_bands_never_overlap(bands: list[tuple[str, int]]) -> None:
    named = [(label, float(start)) for label, start in sorted(bands, key=lambda band: band[1])]
    chart = line_chart([Series("loss", "blue", [[(0, 1.0), (1000, 1.0)]])], named)
    assert chart is not None
    assert [band.label for band in chart.bands] == [label for label, _ in named]
    spans = []
    for band in chart.bands:
        width = LETTER * len(band.label)
        begin = 100 - width if band.at_end else band.start
        assert begin + width <= 100 or band.start == 0
        spans.append((band.row, begin, begin + width))
        assert 0 <= band.row < chart.rows
    for (row, begin, end), (other, first, last) in itertools.combinations(spans, 2):
        assert row != other or end <= first + 1e-9 or last <= begin + 1e-9


def test_labels_share_a_row_where_they_have_room() -> None:
    line = Series("loss", "blue", [[(0, 1.0), (1000, 1.0)]])
    chart = line_chart([line], [("one", 0), ("two", 200), ("a longer label", 210), ("the end", 950)])
    assert chart is not None
    assert [(band.row, band.at_end) for band in chart.bands] == [(0, False), (0, False), (1, False), (0, True)]
