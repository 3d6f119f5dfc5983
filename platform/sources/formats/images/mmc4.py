"""Multimodal C4: sentences of a page, and images each matched to one of them.

https://github.com/allenai/mmc4
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from calumma.model.document import Text
from calumma.platform.sources.files import (
    ABOUT_FIELDS,
    DraftSegment,
    File,
    Malformed,
    Reference,
    field_names,
    json_type,
)
from calumma.platform.sources.formats.images.values import OtherImages
from calumma.platform.sources.formats.records.containers import JSON, records
from calumma.platform.sources.formats.records.rows import drafts
from calumma.platform.sources.registry import ReaderItem, reader

# The last two say nothing that a document has.
KNOWN = frozenset({"text_list", "image_info", *ABOUT_FIELDS, "similarity_matrix", "could_have_url_duplicate"})


@reader("mmc4", JSON)
def mmc4(
    file: File,
    *,
    place: Literal["before", "after"] = "before",
    least_similarity: float = 0.0,
    other_images: OtherImages = "bad",
) -> Iterator[ReaderItem]:
    """{"text_list": [sentence, …], "image_info": [{"image_name", "matched_text_index", "matched_sim"}, …]} a line; each
    image stands before (or after) its sentence. Images that are no more to be had, as many are, make a page bad or with
    `other_images: leave_out` are left out of it; so are those less similar to their sentence than `least_similarity`.
    """

    def page(row: dict[str, Any]) -> list[DraftSegment]:
        texts, images = row.get("text_list"), row.get("image_info")
        if not isinstance(texts, list) or not isinstance(images, list):
            raise Malformed(f"has no lists `text_list` and `image_info`; it has {field_names(row)}")
        matched: list[list[DraftSegment]] = [[] for _ in texts]
        for number, info in enumerate(images):
            if not isinstance(info, dict):
                raise Malformed(f"image {number} is {json_type(info)}, not an object")
            index, name = info.get("matched_text_index"), info.get("image_name")
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(texts):
                raise Malformed(f"image {number} is matched to the text {index!r} of {len(texts)}")
            if name is None and other_images == "leave_out":
                file.notes.skip("images", "that cannot be had")
                continue
            if not isinstance(name, str):
                raise Malformed(f"image {number} has no `image_name`")
            if isinstance(sim := info.get("matched_sim"), int | float) and sim < least_similarity:
                file.notes.skip("images", "less similar to their text than asked")
                continue
            matched[index].append(Reference(name, optional=other_images == "leave_out"))
        segments: list[DraftSegment] = []
        for index, (text, here) in enumerate(zip(texts, matched, strict=True)):
            if not isinstance(text, str):
                raise Malformed(f"the text at index {index} is {json_type(text)}")
            words: list[DraftSegment] = [Text(f"{text}\n" if index + 1 < len(texts) else text)]
            segments += [*here, *words] if place == "before" else [*words, *here]
        return segments

    yield from drafts(records(file), page, file, KNOWN)
