"""COCO Captions and Flickr30k: several captions an image, each a pair of its own.

https://cocodataset.org/#format-data, https://shannon.cs.illinois.edu/DenotationGraph, and the splits of both that
Karpathy published (dataset_coco.json, dataset_flickr30k.json).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

from calumma.model.images import suffixes
from calumma.platform.sources.files import BadInput, Draft, File, Malformed, Reference
from calumma.platform.sources.formats.benchmarks.annotations import (
    LARGEST,
    identity,
    images_below,
    objects,
    parse_object,
)
from calumma.platform.sources.formats.images.captions import NAMES, field_with_words, words_in
from calumma.platform.sources.formats.images.values import OtherImages
from calumma.platform.sources.formats.records.containers import csv_rows, words_of
from calumma.platform.sources.formats.records.rows import LONGEST_LINE, cut_line, skip_line
from calumma.platform.sources.registry import ReaderItem, reader
from calumma.platform.storage import StorageError

IMAGES = tuple(sorted(suffixes()))
COCO_NAME = re.compile(r"captions_\w+\.json$|dataset_coco\.json$")
FLICKR_NAMES = (r"\.token$", r"(results|captions|flickr\w*)\.(csv|txt)$", r"dataset_flickr\w*\.json$")
TOKEN = re.compile(r"(?P<image>.+)#(?P<number>\d+)\t(?P<caption>.*)")
Captions = Literal["each", "first"]
Caption = tuple[str, str, list[str]]  # place, image, captions


def _coco_files(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    return [u for u in uris if COCO_NAME.search(u)], [u for u in uris if u.lower().endswith(IMAGES)]


@reader("coco_captions", (".json",), references="location", choose=_coco_files)
def coco_captions(
    file: File, *, captions: Captions = "each", splits: list[str] | None = None, other_images: OtherImages = "bad"
) -> Iterator[ReaderItem]:
    """annotations/captions_train2017.json and its kind: every caption (or an image's `first`) makes a pair. Images are
    found below the source's `images` (default: its location), there or in train2017/ or whatever they are of.
    `splits` chooses among those of Karpathy's dataset_coco.json: [train, restval].
    """
    content = parse_object(file.read_all(LARGEST), ("images",))
    images = objects(content, "images")
    if "annotations" not in content:
        yield from _pairs(file, _karpathy(file, images, splits), captions, other_images)
        return
    texts: dict[Any, list[tuple[Any, str | None]]] = {}
    for entry in objects(content, "annotations"):
        texts.setdefault(identity(entry.get("image_id")), []).append((entry.get("id"), words_of(entry.get("caption"))))
    licenses = {
        identity(entry.get("id")): str(entry.get("name") or "")
        for entry in objects({"licenses": [], **content}, "licenses")
    }
    split = re.sub(r".*captions_|\.json$", "", file.uri.rpartition("/")[2])
    names = [str(entry.get("file_name") or "") for entry in images]
    several: dict[Any, set[str]] = {}
    for entry, name in zip(images, names, strict=True):
        several.setdefault(identity(entry.get("id")), set()).add(name)
    folder = images_below(file, names, ("", split, f"images/{split}", "images")) or ""
    for entry, name in zip(images, names, strict=True):
        number = identity(entry.get("id"))
        if number is None or not name or len(several[number]) > 1:
            what = "has no id or no `file_name`" if number is None or not name else "is there with several `file_name`s"
            yield BadInput(file.at(f"image {entry.get('id')}"), what)
            continue  # its captions are told below
        found = texts.pop(number, [])
        if not found:
            file.notes.skip("images", "without a caption")
        for number, words in found[: 1 if captions == "first" else None]:
            place = file.at(f"annotation {number}")
            if words is None:
                yield BadInput(place, "has no caption")
                continue
            reference = Reference(posixpath.join(folder, name), words, optional=other_images == "leave_out")
            license = licenses.get(identity(entry.get("license")), "")
            yield Draft((reference,), place, license, str(entry.get("coco_url") or entry.get("flickr_url") or ""))
        if captions == "first" and len(found) > 1:
            file.notes.skip("captions", "beyond an image's first", len(found) - 1)
    for image, orphans in texts.items():
        what = "has not once" if image in several else "does not have"
        for number, _ in orphans:
            yield BadInput(file.at(f"annotation {number}"), f"is of the image {image!r}, which the file {what}")


def _flickr_files(uris: list[str]) -> tuple[Collection[str], Collection[str]]:
    """Of several forms of the captions one is read: else each caption would be there twice."""
    chosen: list[str] = []
    for name in FLICKR_NAMES:
        chosen = chosen or [uri for uri in uris if re.search(name, uri)]
    return chosen, [uri for uri in uris if uri.lower().endswith(IMAGES)]


@reader("flickr30k", (".token", ".csv", ".txt", ".json"), references="location", choose=_flickr_files)
def flickr30k(
    file: File, *, captions: Captions = "each", splits: list[str] | None = None, other_images: OtherImages = "bad"
) -> Iterator[ReaderItem]:
    """results_20130124.token (`IMAGE.jpg#0`, a tab, a caption), results.csv or captions.txt (image, caption), or
    Karpathy's dataset_flickr30k.json: every caption (or an image's `first`) makes a pair. `splits`: of those that name
    theirs. Images are found below the source's `images` (default: its location)."""
    found: Iterator[Caption | BadInput]
    if file.plain_name.endswith(".json"):
        found = _karpathy(file, objects(parse_object(file.read_all(LARGEST), ("images",)), "images"), splits)
    else:
        found = _lines(file, splits)
    yield from _pairs(file, found, captions, other_images)


def _lines(file: File, splits: list[str] | None) -> Iterator[Caption | BadInput]:
    start = b""
    try:
        start = file.content.peek(16)[:16].lower()
    except StorageError:
        raise
    except OSError as error:
        damage, ends = file.damage(file.name, error)
        yield damage
        if ends:
            return
    table = file.plain_name.endswith(".csv") or start.startswith((b"image,", b"image_name"))
    yield from _table(file, splits) if table else _tokens(file)


def _pairs(
    file: File, found: Iterable[Caption | BadInput], captions: Captions, other_images: OtherImages
) -> Iterator[ReaderItem]:
    folder: str | None = None
    seen: set[str] = set()  # images, which need not follow each other
    for item in found:
        if isinstance(item, BadInput):
            yield item
            continue
        place, image, texts = item
        if folder is None:
            folders = ("", "flickr30k-images", "flickr30k_images", "Images", "images")
            folder = images_below(file, (image,), folders) or ""
        if captions == "first":
            kept = [] if image in seen else texts[:1]
            if len(kept) < len(texts):
                file.notes.skip("captions", "beyond an image's first", len(texts) - len(kept))
            texts = kept
            seen.add(image)
        for number, text in enumerate(texts):
            name = place if len(texts) == 1 else f"{place}, caption {number}"
            yield Draft((Reference(posixpath.join(folder, image), text, optional=other_images == "leave_out"),), name)


def _karpathy(file: File, images: list[dict[str, Any]], splits: list[str] | None) -> Iterator[Caption | BadInput]:
    for number, entry in enumerate(images):
        place = file.at(f"image {number}")
        sentences = entry.get("sentences")
        if not isinstance(sentences, list) or not isinstance(entry.get("filename"), str):
            yield BadInput(place, "has no list `sentences` or no `filename`")
            continue
        if splits is not None and entry.get("split") not in splits:
            file.notes.skip("images", f"of the split {entry.get('split')}")
            continue
        texts = [words_of(s.get("raw")) if isinstance(s, dict) else None for s in sentences]
        if not texts or None in texts:
            yield BadInput(place, "has no sentence, or one without words")
            continue
        yield place, posixpath.join(str(entry.get("filepath") or ""), entry["filename"]), [t for t in texts if t]


def _table(file: File, splits: list[str] | None) -> Iterator[Caption | BadInput]:
    for row in csv_rows(file):
        if isinstance(row, BadInput):
            yield row
            continue
        place, record = row
        if splits is not None and record.get("split") not in splits:
            file.notes.skip("rows", f"of the split {record.get('split')}")
            continue
        image = next((record[name] for name in ("image_name", "image", "filename") if record.get(name)), None)
        try:
            field = field_with_words(record, (*NAMES, "raw"))
            words = words_in(record[field], field) if field else []
        except Malformed as error:
            yield BadInput(place, str(error))
            continue
        if image is None or not words:
            yield BadInput(place, f"has no image or no caption; its fields are {', '.join(record)}")
            continue
        yield place, image, words


def _tokens(file: File) -> Iterator[Caption | BadInput]:
    number, behind_damage = 0, False
    while True:
        number += 1
        place = file.at(f"line {number}")
        try:
            line = file.content.readline(LONGEST_LINE + 1)
            if too_long := len(line) > LONGEST_LINE:
                skip_line(file)
        except StorageError:
            raise
        except OSError as error:
            damage, ends = file.damage(place, error)
            yield damage
            if ends:
                return
            behind_damage = True
            continue
        if not line:
            return
        first, behind_damage = behind_damage, False
        if too_long:
            yield BadInput(place, f"longer than {LONGEST_LINE:,} bytes")
            continue
        if (cut := cut_line(file, place, line)) is not None:
            yield cut  # half a caption is none
            behind_damage = True
            continue
        if line.isspace() or first:  # the rest of the line that the damage cut
            continue
        try:
            match = TOKEN.fullmatch(line.decode().rstrip("\r\n"))
        except UnicodeDecodeError:
            yield BadInput(place, "is not UTF-8")
            continue
        if match is None or not (words := match["caption"].strip()):
            yield BadInput(place, "is not IMAGE#NUMBER, a tab, and a caption")
            continue
        yield place, match["image"], [words]
