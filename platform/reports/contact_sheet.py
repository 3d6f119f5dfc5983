"""Contact sheets: many small pictures on one, each with its label, framed green (right) or red (wrong)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

GREEN, RED, PLAIN = (46, 160, 67), (218, 54, 51), (120, 120, 120)
MARGIN, LABEL = 6, 16  # pixels


@dataclass(frozen=True)
class Cell:
    picture: PILImage.Image
    label: str
    right: bool | None = None


def contact_sheet(cells: Sequence[Cell], columns: int, side: int = 72) -> PILImage.Image:
    """RGB picture; every cell is scaled to `side` pixels. No cells give an empty sheet of one row."""
    columns = max(1, min(columns, len(cells)))
    rows = max(1, -(-len(cells) // columns))
    width, height = side + 2 * MARGIN, side + 2 * MARGIN + LABEL
    sheet = PILImage.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, cell in enumerate(cells):
        x, y = index % columns * width + MARGIN, index // columns * height + MARGIN
        colour = PLAIN if cell.right is None else GREEN if cell.right else RED
        draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill=colour)
        sheet.paste(cell.picture.convert("RGB").resize((side, side), PILImage.Resampling.NEAREST), (x, y))
        draw.text((x + side / 2, y + side + 5), cell.label[:14], fill=colour, font=font, anchor="ma")
    return sheet
