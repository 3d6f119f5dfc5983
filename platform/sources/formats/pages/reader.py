"""A folder of Markdown and HTML pages with local images: each page is one interleaved document.

Markdown becomes HTML first, so there is one way to read a page (html.py).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal
from urllib.parse import unquote, urlsplit

from calumma.platform import storage
from calumma.platform.sources.encodings import Encoding, decode_text
from calumma.platform.sources.files import Draft, DraftSegment, File, Reference
from calumma.platform.sources.formats.pages.html import Page, read_html
from calumma.platform.sources.registry import ReaderItem, reader

LARGEST_PAGE = 32 << 20  # bytes of a page
MARKDOWN = (".md", ".markdown")
HTML = (".html", ".htm", ".xhtml")
_COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}charset\s*=\s*["']?\s*([\w:.-]+)|<\?xml[^>]{0,100}encoding\s*=\s*["']([\w:.-]+)""",
    re.IGNORECASE,
)
_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n(.*?\n)?(\1|\.\.\.)[ \t]*(\n|\Z)", re.DOTALL)


@reader("pages", (*MARKDOWN, *HTML), references="location")
def pages(
    file: File, *, other_images: Literal["bad", "leave_out"] = "bad", encoding: Encoding | None = None
) -> Iterator[ReaderItem]:
    """Headings, lists, code and tables as text, images in their places, alternative texts as their captions.

    Images are found from the page's folder, or with a leading `/` from the source's `images` (default: its location).
    What cannot be had (remote, outside, missing) makes the page a bad input; `other_images: leave_out` drops it alone.
    `encoding` is that of pages that declare none, by default UTF-8.
    """
    data = file.read_all(LARGEST_PAGE)
    if file.plain_name.endswith(MARKDOWN):
        words, about = _front_matter(decode_text(data, None, encoding).replace("\r\n", "\n").replace("\r", "\n"))
        page = read_html(_from_markdown(words))
        page = replace(page, license=about.get("license", page.license), url=about.get("url", page.url))
    else:
        declared = _CHARSET.search(_COMMENT.sub(b"", data[:4096]))
        label = (declared[1] or declared[2]).decode() if declared else None
        page = read_html(decode_text(data, label, encoding))
    yield _draft(page, file, other_images == "leave_out")


def _draft(page: Page, file: File, optional: bool) -> Draft:
    try:
        folder = posixpath.dirname(storage.relative(file.uri, file.images))
    except ValueError:  # the images are kept elsewhere, in a folder of their own
        folder = ""
    parts: list[DraftSegment] = []
    for part in page.segments:
        if isinstance(part, Reference):
            target, *others = (_image_path(link, folder, page.base) for link in (part.target, *part.others))
            part = replace(part, target=target, others=tuple(others), optional=optional)
        parts.append(part)
    return Draft(tuple(parts), file.name, page.license, page.url)


def _image_path(link: str, folder: str, base: str) -> str:
    """A link of a page in `folder`, which has another `base`, as a path below the images."""
    link = link.strip()
    try:
        parts, above = urlsplit(link), urlsplit(base).path
    except ValueError:
        return link
    if parts.scheme or parts.netloc:
        return link
    path = unquote(parts.path)
    if path and not path.startswith("/"):
        path = unquote(above[: above.rfind("/") + 1]) + path  # `urljoin` forgets the ".." of a relative base
    return path.lstrip("/") if path.startswith("/") else posixpath.join(folder, path) if path else ""


_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:\s+(.*)|())$")


def _front_matter(words: str) -> tuple[str, dict[str, str]]:
    """The text without the YAML or TOML at its beginning, and its strings; what is neither is text."""
    match = _FRONT_MATTER.match(words)
    if match is None:
        return words, {}
    import tomllib

    import yaml

    try:
        values = tomllib.loads(match[2] or "") if match[1] == "+++" else yaml.safe_load(match[2] or "")
    except (yaml.YAMLError, ValueError, RecursionError):  # such as `title: a: b`, which other readers take, too
        lines = (match[2] or "").splitlines()
        if match[1] == "+++" or not all(_KEY.match(line) or line[:1] in ("", " ", "\t", "-", "#") for line in lines):
            return words, {}
        values = {key[1]: (key[2] or "").strip(" '\"") for line in lines if (key := _KEY.match(line))}
    if not isinstance(values, dict):
        return words, {}
    about = {key: ", ".join(value) if _is_words(value) else value for key, value in values.items()}
    return words[match.end() :], {key: value for key, value in about.items() if isinstance(value, str)}


def _is_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _from_markdown(words: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(words))
