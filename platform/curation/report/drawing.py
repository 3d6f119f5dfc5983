"""Histograms as SVG, drawn by hand: a page holds dozens, and they take the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from calumma.platform.curation.report.findings import bin_middle

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 420, 150, 8, 18, 14  # of the drawing, and around the bars
BARS = 40
WIDE = 12  # largest by smallest value from which an axis is logarithmic


def histogram(kept: Mapping[int, int], dropped: Mapping[int, int]) -> str:
    """Two counts by bin (findings.bin_of), one on the other."""
    values = {number: bin_middle(number) for number in {*kept, *dropped}}
    if not values:
        return ""
    low, high = min(values.values()), max(values.values())
    logarithmic = low > 0 and high > WIDE * low
    place = math.log if logarithmic else float
    begin, end = place(low), place(high)
    if end - begin <= abs(end) * 1e-9:  # one value: a bar with some room beside it
        room = abs(end) * 0.1 or 0.5
        begin, end = begin - room, end + room
    heights = [[0, 0] for _ in range(BARS)]
    for which, counts in enumerate((kept, dropped)):
        for number, count in counts.items():
            bar = int((place(values[number]) - begin) / (end - begin) * BARS)
            heights[min(bar, BARS - 1)][which] += count
    return _svg(heights, begin, end, logarithmic)


def _svg(heights: list[list[int]], begin: float, end: float, logarithmic: bool) -> str:
    tallest = max(map(sum, heights))
    room, width = HEIGHT - BELOW - ABOVE, (WIDTH - 2 * LEFT) / BARS
    back = math.exp if logarithmic else float
    parts = []
    for bar, (kept, dropped) in enumerate(heights):
        if not kept + dropped:
            continue
        x = LEFT + bar * width
        edges = (back(begin + (end - begin) * bar / BARS), back(begin + (end - begin) * (bar + 1) / BARS))
        title = f"{number(edges[0])} to {number(edges[1])}: {kept:,} kept, {dropped:,} dropped"
        y = float(HEIGHT - BELOW)
        shapes = ""
        for count, colour in ((kept, "--kept"), (dropped, "--dropped")):
            if count:
                height = max(1.0, room * count / tallest)
                y -= height
                shapes += (
                    f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height:.1f}" '
                    f'style="fill:var({colour})"/>'
                )
        parts.append(f"<g><title>{escape(title)}</title>{shapes}</g>")
    line = HEIGHT - BELOW
    parts.append(f'<path d="M{LEFT} {line}H{WIDTH - LEFT}" style="stroke:var(--line)"/>')
    for value in ticks(back(begin), back(end), logarithmic):
        x = LEFT + ((math.log(value) if logarithmic else value) - begin) / (end - begin) * (WIDTH - 2 * LEFT)
        anchor = "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"
        parts.append(f'<path d="M{x:.1f} {line}v4" style="stroke:var(--line)"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 3}" text-anchor="{anchor}">{number(value)}</text>')
    parts.append(f'<text x="{LEFT}" y="10">{tallest:,}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


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
