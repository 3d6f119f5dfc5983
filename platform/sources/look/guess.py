"""What a location seems to hold: a format, its options, and the reason, from names of files and the first records."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from calumma.platform import storage
from calumma.platform.sources.files import BadInput, File, Malformed, Reference
from calumma.platform.sources.formats import find_format
from calumma.platform.sources.formats.conversations.exchanges import LISTS, exchange
from calumma.platform.sources.formats.conversations.marks import FORMS
from calumma.platform.sources.formats.images.captions import NAMES
from calumma.platform.sources.formats.images.folders import IMAGES, METADATA, SIDECARS
from calumma.platform.sources.formats.images.pairs import IMAGES as IMAGE_FIELDS
from calumma.platform.sources.formats.images.pairs import PairFields
from calumma.platform.sources.formats.images.values import PATHS
from calumma.platform.sources.formats.pages.reader import HTML, MARKDOWN
from calumma.platform.sources.formats.records.containers import ABOUT, SUFFIXES, list_in, records
from calumma.platform.sources.formats.text import FIELDS as TEXT_FIELDS
from calumma.platform.sources.notes import Notes

RECORDS = 200  # of a file that are looked at
BENCHMARKS = (
    ("coco_captions", re.compile(r"captions_\w+\.json$|dataset_coco\.json$"), "{name} is named as COCO's captions are"),
    ("vqav2", re.compile(r"OpenEnded_\w*questions\.json$"), "{name} is named as VQAv2's questions are"),
    ("mnist", re.compile(r"idx3-ubyte(\.gz)?$"), "{name} is named as MNIST's images are"),
    ("flickr30k", re.compile(r"results\w*\.token$|flickr30k\w*\.(json|csv)$|flickr_anno\w*\.csv$|/results\.csv$"),
     "{name} is named as Flickr30k's captions are"),
)  # fmt: skip
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")


@dataclass(frozen=True)
class Guess:
    format: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    images: str | None = None


def guess_format(location: str, sizes: Mapping[str, int]) -> Guess | str:
    """What the files (URI -> bytes) at a location seem to be, or why they seem to be nothing that is read.

    Raises StorageError."""
    uris = sorted(sizes)
    if not uris:
        return "there is nothing at that location"
    for form, pattern, reason in BENCHMARKS:
        if found := next((uri for uri in uris if pattern.search(uri)), None):
            return Guess(form, reason.format(name=_name(found)))
    images = [uri for uri in uris if uri.lower().endswith(IMAGES)]
    if images and (described := next((uri for uri in uris if _name(uri) in METADATA), None)):
        return Guess("imagefolder", f"{_name(described)} lies beside images")
    tars = [uri for uri in uris if uri.lower().endswith(TARS)]
    if tars and 2 * sum(sizes[uri] for uri in tars) >= sum(sizes.values()):
        return Guess("webdataset", f"most of the bytes are in {_counted(tars, 'tar archive')}")
    keys = {posixpath.splitext(uri)[0] for uri in images}
    beside = [uri for uri in uris if uri.endswith(SIDECARS) and posixpath.splitext(uri)[0] in keys]
    if beside:
        return Guess("image_files", f"images have {_counted(beside, 'file')} of the same name beside them")
    tables = [uri for uri in uris if uri.lower().endswith(SUFFIXES) and _name(uri) not in ABOUT]
    why = ""
    for uri in tables[:5]:
        guess = _guess_records(location, uri, uris)
        if isinstance(guess, Guess):
            return guess
        why = why or f"{_name(uri)}: {guess}"
    pages = [uri for uri in uris if uri.lower().endswith((*MARKDOWN, *HTML))]
    if images and len(images) > len(pages):
        folders = {posixpath.basename(posixpath.dirname(uri)) for uri in images}
        return Guess(
            "imagefolder", f"{_counted(images, 'image')} in {_counted(folders, 'folder')}, which may name them"
        )
    if pages:
        return Guess("pages", f"{_counted(pages, 'page')} of Markdown or HTML")
    if texts := [uri for uri in uris if uri.lower().endswith(find_format("text_files").suffixes)]:
        return Guess("text_files", _counted(texts, "file of text"))
    suffixes = ", ".join(sorted({posixpath.splitext(uri)[1] or _name(uri) for uri in uris})[:8])
    return why or f"no format reads {suffixes}; a reader of your own is a function of a few lines"


def first_records(uri: str, limit: int = RECORDS) -> Iterator[Mapping[str, Any]]:
    """The first records of a file that has records. Raises StorageError."""
    with storage.open_read(uri) as raw:
        try:
            for row in islice(records(File(uri, raw, uri.rpartition("/")[0])), limit):
                if not isinstance(row, BadInput):
                    yield row[1]
        except Malformed:
            return


def _guess_records(location: str, uri: str, uris: Sequence[str]) -> Guess | str:
    rows = list(first_records(uri, 20))
    if not rows:
        head = storage.read_range(uri, 0, min(4096, storage.size(uri)))
        if b'"paragraphs"' in head or b'"qas"' in head:
            return Guess("squad", f"{_name(uri)} has paragraphs with questions, as SQuAD does")
        return "no record could be read"
    row = rows[0]
    has = ", ".join(f"`{name}`" for name in row)[:200]
    if isinstance(row.get("data"), list) and "paragraphs" in json.dumps(row["data"][:1]):
        return Guess("squad", f"{_name(uri)} has paragraphs with questions, as SQuAD does")
    if isinstance(row.get("answers"), Mapping) and "context" in row:
        return Guess("squad", f"its records have a context, a question and answers: {has}")
    if "text_list" in row and "image_info" in row:
        return Guess("mmc4", "its records have `text_list` and `image_info`", {}, _images_of(location, uri, uris, rows))
    texts = row.get("texts")
    if (
        isinstance(texts, list)
        and isinstance(row.get("images"), list)
        and not any(isinstance(t, Mapping) for t in texts)
    ):
        images = _images_of(location, uri, uris, rows)
        return Guess("interleaved", "its records have parallel lists `texts` and `images`", {}, images)
    try:
        for each in rows:
            exchange(each)
        kind = next((name for name in LISTS if row.get(name) is not None), None)
        reason = f"its records have turns in `{kind}`" if kind else f"its records hold a question and an answer: {has}"
        return Guess("conversations", reason, _mark_of(rows), _images_of(location, uri, uris, rows))
    except Malformed:
        pass
    if image := next((name for name in IMAGE_FIELDS if _is_image(row.get(name))), None):
        caption = next((name for name in NAMES if name in row), None)
        reason = f"its records have images in `{image}`" + (f" and texts in `{caption}`" if caption else "")
        return Guess("pairs", reason, {}, _images_of(location, uri, uris, rows))
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return Guess("text", f"its records have a `{name}`")
    longest = Counter({n: sum(len(r[n]) for r in rows if isinstance(r.get(n), str)) for n in row}).most_common(1)
    if longest and longest[0][1]:
        name = longest[0][0]
        return Guess("text", f"of the fields {has}, `{name}` holds the longest texts", {"field": name})
    return f"its records have {has}, of which no format is known"


def _is_image(value: Any) -> bool:
    """Whether a field holds an image, or names one: the path of a program is none."""
    try:
        value = list_in(value)
    except Malformed:
        return False
    if isinstance(value, list):
        return bool(value) and _is_image(value[0])
    if isinstance(value, Mapping):
        return any(value.get(key) for key in ("bytes", *PATHS))
    if isinstance(value, str):
        return value.startswith("data:image/") or value.lower().endswith(IMAGES)
    return isinstance(value, bytes)


def _mark_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    words = json.dumps([exchange(row).turns for row in rows], ensure_ascii=False, default=str)
    counts = Counter({form: len(pattern.findall(words)) for form, pattern in FORMS.items()})
    form, count = counts.most_common(1)[0]
    return {"mark": form} if count and form != "<image>" else {}


def _images_of(location: str, uri: str, uris: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The folder below which the records' paths lead to files, where it is not that of their own file."""
    folder = uri.rpartition("/")[0]
    paths = [target for row in rows for target in _paths(row)]
    known = set(uris)
    for path in paths:
        if storage.join(folder, path) in known:
            return None
        if found := next((u for u in uris if u.endswith(f"/{path}")), None):
            return found[: -len(path) - 1]
    return None


def _paths(row: Mapping[str, Any]) -> list[str]:
    for info in row.get("image_info") or ():
        if isinstance(info, Mapping) and isinstance(info.get("image_name"), str):
            return [info["image_name"]]
    targets: list[str] = []
    try:
        parts = PairFields().image_segments(row, Notes(), set())
    except Malformed:
        return targets
    for part in parts:
        if isinstance(part, Reference) and not part.target.startswith("data:"):
            targets.append(posixpath.normpath(part.target))
    return targets


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]


def _counted(found: Any, what: str) -> str:
    return f"{len(found):,} {what}{'' if len(found) == 1 else 's'}"
