"""Charts as numbers, for the macros of `macros.html.j2` to draw: every place in percent of the drawing, from its top
left corner. Colours are CSS colours, say `var(--kept)` of the base template's style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BARS = 40
GAP = 10  # percent of a bar's width that stays free
ROOM = 98.0  # percent of the height for the tallest bar; what is too small to be seen gets 1 and must fit as well
AIR = 1.05  # times the largest value: where an axis upward ends
TINY = 1e-30  # nearer to 0 is 0
WIDE = 12  # largest by smallest value from which an axis is logarithmic
LETTER = 2.4  # percent of the width that a letter needs on the narrowest screen: 6.5 of 270 pixels


@dataclass(frozen=True)
class Tick:
    place: float
    label: str


@dataclass(frozen=True)
class Axis:
    """The range of values that a drawing shows."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Iterable[float], logarithmic: bool | None = None) -> Axis:
        """From the smallest to the largest value, of which there must be one; logarithmic by itself where they are far
        apart. A single value gets some room around it."""
        ordered = sorted(values)
        low, high = ordered[0], ordered[-1]
        if logarithmic is None:
            logarithmic = low > TINY and high > WIDE * low
        if high - low <= max(abs(high) * 1e-9, TINY):
            room = abs(high) * 0.1 if abs(high) > TINY else 0.5
            return cls(low - room, high + room, logarithmic)
        return cls(low, high, logarithmic)

    def place(self, value: float) -> float:
        """0 to 100."""
        scale = math.log if self.logarithmic else float
        return 100 * (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))

    def value(self, place: float) -> float:
        """The inverse of `place`."""
        if self.logarithmic:
            return math.exp(math.log(self.low) + (math.log(self.high) - math.log(self.low)) * place / 100)
        return self.low + (self.high - self.low) * place / 100

    def ticks(self) -> list[float]:
        """A few round values within."""
        found = ticks(self.low, self.high, self.logarithmic)
        return found if len(found) > 1 else ticks(self.low, self.high, False)


# -- histograms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    top: float
    height: float
    colour: str


@dataclass(frozen=True)
class Bar:
    left: float
    width: float
    title: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Histogram:
    """`tallest`: how many values the highest bar counts."""

    bars: list[Bar]
    ticks: list[Tick]
    tallest: int


def histogram(series: Mapping[str, Mapping[float, int]], colours: Mapping[str, str]) -> Histogram | None:
    """How often values occur, by name; the series stand on each other. None when nothing was counted."""
    values = {value for counts in series.values() for value in counts}
    if not values:
        return None
    axis = Axis.over(values)
    bars = [dict.fromkeys(series, 0) for _ in range(BARS)]
    for name, counts in series.items():
        for value, count in counts.items():
            bars[min(int(axis.place(value) * BARS / 100), BARS - 1)][name] += count
    tallest = max(sum(bar.values()) for bar in bars)
    width = 100 / BARS
    drawn = []
    for place, bar in enumerate(bars):
        if not any(bar.values()):
            continue
        between = f"{number(axis.value(place * width))} to {number(axis.value((place + 1) * width))}"
        title = f"{between}: {', '.join(f'{count:,} {name}' for name, count in bar.items())}"
        top = 100.0
        pieces = []
        for name, count in bar.items():
            if count:
                height = max(1.0, ROOM * count / tallest)
                top -= height
                pieces.append(Piece(top, height, colours[name]))
        drawn.append(Bar(place * width + width * GAP / 200, width * (100 - GAP) / 100, title, pieces))
    return Histogram(drawn, [Tick(axis.place(value), number(value)) for value in axis.ticks()], tallest)


# -- lines -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """What one colour shows: pieces of (x, y), of which each is one line."""

    name: str
    colour: str
    pieces: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Line:
    points: str  # "x,y x,y ..."
    colour: str


@dataclass(frozen=True)
class Band:
    """A named stretch of the axis along. `row`: where its label stands, 0 on top, so that no two overlap.
    `at_end`: there is no room to the right of `start`, the label ends where the drawing does."""

    label: str
    start: float
    row: int
    at_end: bool


@dataclass(frozen=True)
class LineChart:
    lines: list[Line]
    along: list[Tick]
    up: list[Tick]
    legend: list[tuple[str, str]]
    bands: list[Band]
    rows: int


def line_chart(
    series: Sequence[Series], bands: Sequence[tuple[str, float]] = (), logarithmic: bool = False
) -> LineChart | None:
    """Lines over one axis. Values begin at 0, or where the smallest is when `logarithmic`. What cannot be drawn (NaN,
    infinity, nothing above 0 on a logarithmic axis) is left away; None when nothing is left.

    `bands`: (label, where it starts), in their order.
    """
    kept = [Series(s.name, s.colour, [_drawable(piece, logarithmic) for piece in s.pieces]) for s in series]
    kept = [Series(s.name, s.colour, [piece for piece in s.pieces if piece]) for s in kept]
    points = [point for s in kept for piece in s.pieces for point in piece]
    if not points:
        return None
    starts = [start for _, start in bands]
    along = Axis.over([0.0, *starts, *(x for x, _ in points)], logarithmic=False)
    heights = [y for _, y in points]
    if logarithmic:
        up = Axis(min(heights) / AIR, AIR * max(heights), True)
    else:
        up = Axis.over([0.0, *heights, AIR * max(heights)], logarithmic=False)
    placed = _labels([(label, along.place(start)) for label, start in bands])
    return LineChart(
        lines=[Line(_path(piece, along, up), s.colour) for s in kept for piece in s.pieces],
        along=[Tick(along.place(value), number(value)) for value in along.ticks()],
        up=[Tick(100 - up.place(value), number(value)) for value in up.ticks()],
        legend=[(s.name, s.colour) for s in kept if s.pieces],
        bands=placed,
        rows=1 + max((band.row for band in placed), default=-1),
    )


def _drawable(piece: Sequence[tuple[float, float]], logarithmic: bool) -> list[tuple[float, float]]:
    finite = [(x, y if abs(y) > TINY else 0.0) for x, y in piece if math.isfinite(y)]
    return [(x, y) for x, y in finite if y > 0 or not logarithmic]


def _path(piece: Sequence[tuple[float, float]], along: Axis, up: Axis) -> str:
    if len(piece) == 1:
        piece = [*piece, *piece]  # a line of no length is a point
    return " ".join(f"{along.place(x):.2f},{100 - up.place(y):.2f}" for x, y in piece)


def _labels(bands: Sequence[tuple[str, float]]) -> list[Band]:
    """Each label in the highest row where it overlaps none, even on the narrowest screen."""
    rows: list[list[tuple[float, float]]] = []
    placed = []
    for label, start in bands:
        width = LETTER * len(label)
        at_end = start > 0 and start + width > 100
        span = (100 - width, 100.0) if at_end else (start, start + width)
        free = (all(span[1] <= begin or end <= span[0] for begin, end in taken) for taken in rows)
        row = next((row for row, is_free in enumerate(free) if is_free), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(span)
        placed.append(Band(label, start, row, at_end))
    return placed


# -- numbers -----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Three to seven round values in a range; in a logarithmic one, which is wide, 1, 2 and 5 times powers of ten."""
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
            if len(found) <= 7:
                return found
        return found[:: -(-len(found) // 7)]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """A value in few characters: 12, 1.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
