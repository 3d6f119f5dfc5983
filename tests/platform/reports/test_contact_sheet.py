"""Contact sheets: pictures beside each other, framed by whether they are right."""

from __future__ import annotations

from PIL import Image as PILImage

from calumma.platform.reports.contact_sheet import GREEN, LABEL, MARGIN, PLAIN, RED, Cell, contact_sheet


def test_a_contact_sheet_frames_right_and_wrong() -> None:
    grey = PILImage.new("L", (8, 8), 40)
    made = contact_sheet([Cell(grey, "one", True), Cell(grey, "six", False), Cell(grey, "two")], columns=2, side=40)
    width, height = 40 + 2 * MARGIN, 40 + 2 * MARGIN + LABEL
    assert made.size == (2 * width, 2 * height)
    corner = MARGIN - 2
    assert made.getpixel((corner, corner)) == GREEN
    assert made.getpixel((width + corner, corner)) == RED
    assert made.getpixel((corner, height + corner)) == PLAIN
    assert made.getpixel((MARGIN + 20, MARGIN + 20)) == (40, 40, 40)


def test_a_contact_sheet_of_nothing_is_one_empty_row() -> None:
    assert contact_sheet([], columns=5, side=40).size == (40 + 2 * MARGIN, 40 + 2 * MARGIN + LABEL)
