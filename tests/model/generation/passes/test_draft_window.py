"""How many codes are drafted: what pays, by costs and by how far drafts stood."""

from __future__ import annotations

from calumma.model.generation.passes.draft_window import AGAIN, MOST, WINDOWS, MeasuredWindow, measured

FLAT = dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 1.0)  # as where memory is the limit
STEEP = {rows: float(rows) for rows in FLAT}  # as where arithmetic is


def told(window: MeasuredWindow, drafted: int, stood: int, times: int = 500) -> MeasuredWindow:
    for _ in range(times):
        window.note(drafted, stood)
    return window


def test_as_many_are_drafted_as_pay() -> None:
    assert MeasuredWindow(FLAT).most(1, 1) == MOST, "what costs nothing is tried"
    assert MeasuredWindow(STEEP).most(1, 1) == 0
    slope = MeasuredWindow({rows: 1 + 0.1 * rows for rows in FLAT})
    good, bad = (told(MeasuredWindow(slope.seconds), MOST, stood) for stood in (6, 0))
    assert good.most(1, 1) == 6, "none beyond what stands"
    assert bad.most(1, 1) == 0
    few, many = (MeasuredWindow(slope.seconds).most(images, 3 * images) for images in (1, 8))
    assert MOST > few > many, "the more are drawn at once the less room there is"


def test_drafts_that_did_not_stand_are_tried_again() -> None:
    window = told(MeasuredWindow(FLAT | {2: 3.0, 4: 3.0, 8: 3.0, 16: 3.0, 32: 3.0, 64: 3.0}), MOST, 0)
    chosen = [window.most(1, 1) for _ in range(2 * AGAIN)]
    assert sum(each > 0 for each in chosen) == 2
    assert told(window, 3, 3, 2000).most(1, 1) >= 3


def test_costs_lie_between_those_measured_and_go_on_beyond() -> None:
    asked: list[int] = []

    def seconds(rows: int) -> float:
        asked.append(rows)
        return 2.0 + rows

    window = measured(seconds, 20)
    assert sorted(set(asked)) == [1, 2, 4, 8, 16], "no more than fit"
    assert [window.cost(tokens) for tokens in (1, 3, 16, 48)] == [3.0, 5.0, 18.0, 50.0]
    assert set(WINDOWS) <= set(range(MOST + 1))
