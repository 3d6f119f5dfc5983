"""Answers as pictures."""

from __future__ import annotations

from PIL import Image as PILImage

from calumma.model.document import Document, Image, Text
from calumma.platform.training import samples


def test_an_answer_is_drawn_with_all_of_its_parts() -> None:
    red = PILImage.new("RGB", (8, 8), "red")
    answer = Document((Text("here is one\nand more"), Image(red), Text("")))
    drawn = samples.render_answer("Draw a red square.", answer)
    colors = {color for _, color in drawn.getcolors(1 << 20) or []}
    assert (255, 0, 0) in colors  # the image
    assert (0, 0, 0) in colors  # the text
    assert drawn.height > samples.render_answer("Draw a red square.", Document((Text("here is one"),))).height
