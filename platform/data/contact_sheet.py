"""A contact sheet: the first images of some documents in one picture, each over the words it came with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps

from calumma.model.document import Document, Image

SIDE, LINE, GAP, COLUMNS, LETTERS = 96, 14, 8, 8, 15  # pixels, but for COLUMNS and LETTERS (a label)


def contact_sheet(documents: Iterable[Document], limit: int) -> PILImage.Image:
    """An RGB picture of at most `limit` images, eight a row, in the documents' order. Raises UnreadableImage."""
    shown = list(islice(_labelled(documents), limit))
    rows = max(1, -(-len(shown) // COLUMNS))
    cell_width, cell_height = SIDE + GAP, SIDE + LINE + GAP
    sheet = PILImage.new("RGB", (COLUMNS * cell_width + GAP, rows * cell_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(shown):
        left, top = GAP + index % COLUMNS * cell_width, GAP + index // COLUMNS * cell_height
        picture = ImageOps.pad(image.open(), (SIDE, SIDE), PILImage.Resampling.NEAREST, color="#eeeeee")
        sheet.paste(picture, (left, top))
        draw.text((left, top + SIDE + 1), label, fill="black")
    return sheet


def _labelled(documents: Iterable[Document]) -> Iterator[tuple[Image, str]]:
    for document in documents:
        for image in document.images:
            words = " ".join((image.caption or document.text).split())
            yield image, words if len(words) <= LETTERS else f"{words[: LETTERS - 1]}…"
