"""A folder of Markdown and HTML pages with local images: each page is one interleaved document.

Markdown becomes HTML first, so there is one way to read a page (html.py).
"""

from __future__ import annotations

import codecs
import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal
from urllib.parse import unquote, urlsplit

from calumma.platform import storage
from calumma.platform.sources.files import Draft, DraftSegment, File, Malformed, Reference
from calumma.platform.sources.formats.html import Page, read_html
from calumma.platform.sources.registry import ReaderItem, reader

LARGEST_PAGE = 32 << 20  # bytes of a page
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm", ".xhtml")
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?([\w:.-]+)""", re.IGNORECASE)
FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(---|\.\.\.)[ \t]*(\n|\Z)", re.DOTALL)


@reader("pages", (*MARKDOWN, *HTML), references="location")
def pages(file: File, *, other_images: Literal["bad", "leave_out"] = "bad") -> Iterator[ReaderItem]:
    """Headings, lists, code and tables as text, images in their places, alternative texts as their captions.

    Images are found from the page's folder, or with a leading `/` from the source's `images` (default: its location).
    What cannot be had (remote, outside, missing) makes the page a bad input; `other_images: leave_out` drops it alone.
    """
    data = file.read_all(LARGEST_PAGE)
    if file.plain_name.endswith(MARKDOWN):
        words, about = _front_matter(_decode_text(data, None))
        page = read_html(_from_markdown(words))
        page = replace(page, license=about.get("license", page.license), url=about.get("url", page.url))
    else:
        declared = CHARSET.search(data[:4096])
        page = read_html(_decode_text(data, declared[1].decode() if declared else None))
    yield _draft(page, file, other_images == "leave_out")


def _draft(page: Page, file: File, optional: bool) -> Draft:
    try:
        folder = posixpath.dirname(storage.relative(file.uri, file.images))
    except ValueError:  # the images are kept elsewhere, in a folder of their own
        folder = ""
    parts: list[DraftSegment] = []
    for part in page.segments:
        if isinstance(part, Reference):
            part = replace(part, target=_image_path(part.target, folder), optional=optional)
        parts.append(part)
    return Draft(tuple(parts), file.uri, page.license, page.url)


def _image_path(link: str, folder: str) -> str:
    """A link of a page in `folder` as a path below the images."""
    link = link.strip()
    try:
        parts = urlsplit(link)
    except ValueError:
        return link
    if parts.scheme or parts.netloc:
        return link
    path = unquote(parts.path)
    return path.lstrip("/") if path.startswith("/") else posixpath.join(folder, path) if path else ""


def _decode_text(data: bytes, declared: str | None) -> str:
    """Text in the encoding that its byte order mark or the page declares, by default UTF-8. Raises Malformed."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), declared or "utf-8")
    try:
        return data.decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise Malformed(f"is no text in {encoding}: {error}") from error


def _front_matter(words: str) -> tuple[str, dict[str, str]]:
    """The text without YAML at its beginning, and that YAML's strings; what is no YAML object is text."""
    match = FRONT_MATTER.match(words)
    if match is None:
        return words, {}
    import yaml

    try:
        values = yaml.safe_load(match[1] or "")
    except (yaml.YAMLError, ValueError, RecursionError):
        return words, {}
    if not isinstance(values, dict):
        return words, {}
    return words[match.end() :], {key: value for key, value in values.items() if isinstance(value, str)}


def _from_markdown(words: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(words))
