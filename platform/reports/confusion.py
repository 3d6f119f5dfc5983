"""Confusion matrices as pictures: a row for each label that was asked for, a column for each that was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

CELL, MARGIN, SIZE = 34, 8, 12  # pixels
OTHER = "other"  # the column of what is none of the labels
RIGHT, WRONG = (46, 160, 67), (218, 54, 51)
INK, FAINT = (36, 41, 47), (208, 215, 222)


def confusion_counts(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> list[list[int]]:
    """[labels, labels + 1] counts of (asked for, given); the last column is of what is none of the labels."""
    counts = Counter((asked, given if given in labels else OTHER) for asked, given in pairs)
    return [[counts[asked, given] for given in (*labels, OTHER)] for asked in labels]


def confusion_matrix(
    pairs: Sequence[tuple[str, str]], labels: Sequence[str], rows: str, columns: str
) -> PILImage.Image:
    """RGB picture. A cell is as strong in colour as its share of its row: green on the diagonal, red beside it."""
    counts = confusion_counts(pairs, labels)
    font = ImageFont.load_default(size=SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # one of a size is
    names = [*labels, OTHER]
    widest = max(round(font.getlength(name)) for name in names)
    left = top = widest + SIZE + 3 * MARGIN
    size = (left + CELL * len(names) + MARGIN, top + CELL * len(labels) + MARGIN)
    picture = PILImage.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left + CELL * len(names) / 2, MARGIN), columns, fill=INK, font=font, anchor="ma")
    _upright(picture, rows, (MARGIN, top + CELL * len(labels) // 2), font, centred=True)
    for place, name in enumerate(names):
        _upright(picture, name, (left + place * CELL + CELL // 2 - 7, top - MARGIN), font)
    for row, name in enumerate(labels):
        y = top + row * CELL
        draw.text((left - MARGIN, y + CELL / 2), name, fill=INK, font=font, anchor="rm")
        every = sum(counts[row])
        for column, count in enumerate(counts[row]):
            x = left + column * CELL
            share = count / every if every else 0.0
            colour = _mixed(RIGHT if column == row else WRONG, share)
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=colour, outline=FAINT)
            if count:
                ink = "white" if share > 0.6 else INK
                draw.text((x + CELL / 2, y + CELL / 2), str(count), fill=ink, font=font, anchor="mm")
    return picture


def _mixed(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """White for nothing, the colour for all; small shares are still seen."""
    part = share**0.6
    red, green, blue = (round(255 + (channel - 255) * part) for channel in colour)
    return red, green, blue


def _upright(
    picture: PILImage.Image, text: str, foot: tuple[int, int], font: ImageFont.FreeTypeFont, centred: bool = False
) -> None:
    """A text that reads from below to above, its left lower corner (or the middle of its height) at `foot`."""
    strip = PILImage.new("RGB", (round(font.getlength(text)) + 2, 16), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill=INK, font=font)
    strip = strip.rotate(90, expand=True)
    picture.paste(strip, (foot[0], foot[1] - (strip.height // 2 if centred else strip.height)))
