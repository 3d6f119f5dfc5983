"""HTML as text and images in reading order, without what is not content (scripts, styles, navigation).

Structure stays visible in plain text, written as Markdown: headings, lists, quotes, code, tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from calumma.model.document import Text
from calumma.platform.sources.files import DraftSegment, Malformed, Reference
from calumma.platform.sources.formats.pages.html_images import noscript_images, sources_of

DEEPEST_NESTING = 1000  # elements in each other; the parser's time grows with the square of it
# Elements that end by themselves, so that counting their tags does not tell how deep they are.
FLAT = (
    "area base br col embed hr img input link meta param source track wbr p li dt dd tr td th thead tbody tfoot "
    "option optgroup rt rp html head body"
)
NO_CONTENT = (
    "script, style, template, nav, footer, button, input, select, textarea, dialog, iframe, object, svg, "
    "canvas, audio, video, a.headerlink, [hidden], [aria-hidden=true], [style*='display:none'], "
    "[style*='display: none'], [role=navigation], [role=banner], [role=search], [role=contentinfo], [role=menu], "
    "[role=dialog]"
)
BESIDE = "aside, [role=complementary], body > header"  # of a page that does not say where its content is
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
SECTIONS = (
    "address article blockquote body center details dl fieldset figcaption figure footer form header hgroup hr main ol "
    "p pre section summary table ul"
)
LINES = "caption dd div dt li tbody tfoot thead tr"
BLOCKS = {**dict.fromkeys([*SECTIONS.split(), *HEADINGS], 2), **dict.fromkeys(LINES.split(), 1)}  # line breaks around
TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)")
SPACE = re.compile(r"[ \t\r\n\f]+")
LANGUAGE = re.compile(r"(?:^|\s)(?:language|lang|highlight-source)-([\w+#.-]+)")


@dataclass(frozen=True)
class Page:
    segments: tuple[DraftSegment, ...]
    license: str = ""
    url: str = ""
    base: str = ""  # a path that links of the page begin from


def read_html(html: str) -> Page:
    """The content of a page; its images are references as they are written there. Raises Malformed when elements are
    nested too deep."""
    from selectolax.lexbor import LexborHTMLParser

    _check_depth(html)
    tree = LexborHTMLParser(html)
    license = _address(tree, "link[rel~=license], a[rel~=license]")
    url = _address(tree, "link[rel~=canonical]")
    base = _address(tree, "base[href]")
    base = "" if base.startswith("//") or ":" in base.partition("/")[0] else base  # of a site: its images are not here
    body = tree.body
    if body is None:
        return Page((), license, url, base)
    root = _content(body)
    left_out = {node.mem_id for node in body.css(NO_CONTENT if root else f"{NO_CONTENT}, {BESIDE}")}
    return Page(tuple(_MarkdownWriter(left_out).write(root or body)), license, url, base)


def _check_depth(html: str) -> None:
    depth, flat = 0, set(FLAT.split())
    for match in TAG.finditer(html):
        if match[2].lower() not in flat:
            depth = max(0, depth - 1) if match[1] else depth + 1
            if depth > DEEPEST_NESTING:
                raise Malformed(f"more than {DEEPEST_NESTING:,} elements in each other")


def _address(tree: Any, selector: str) -> str:
    node = tree.css_first(selector)
    return (node.attributes.get("href") or "").strip() if node is not None else ""


def _content(body: Any) -> Any:
    """The one element that a page says is its content, if it does."""
    for selector in ("main, [role=main]", "article"):
        elements = body.css(selector)
        if len(elements) == 1:
            return elements[0]
    return None


class _MarkdownWriter:
    """Writes nodes as they would be typed in Markdown, cut where images stand."""

    def __init__(self, left_out: set[int]) -> None:
        self._left_out = left_out
        self._parts: list[DraftSegment] = []
        self._text: list[str] = []  # since the last image
        self._breaks = 0  # line breaks owed before the next word
        self._outer = ""  # how lines begin on both sides of these breaks
        self._space = False  # or a space is owed
        self._indents: list[str] = []  # how lines begin, by the open lists and quotes
        self._marker = ""  # how the next line begins, while the first word of a list item or heading is to come
        self._numbers: list[int | None] = []  # the next number of each open list; None has bullets
        self._taken: set[str] = set()  # links of the images so far
        self._rows: list[list[bool]] = []  # the cells so far of each open row: is it a heading?

    def write(self, root: Any) -> list[DraftSegment]:
        stack = [(root, True)]  # no recursion: pages may be nested deep
        while stack:
            node, begins = stack.pop()
            if not begins:
                self._leave(node.tag)
            elif node.mem_id not in self._left_out and self._enter(node):
                stack.append((node, False))
                child = node.last_child
                while child is not None:
                    stack.append((child, True))
                    child = child.prev
        self._cut()
        return self._parts

    def _enter(self, node: Any) -> bool:
        """Begin a node; whether its children follow."""
        tag = node.tag
        if node.is_text_node:
            self._words(node.text_content or "")
        elif tag == "img":
            self._image(node)
        elif tag == "noscript":
            for image in noscript_images(node):
                if image.mem_id not in self._left_out and self._taken.isdisjoint(sources_of(image)):
                    self._image(image)
        elif tag == "br":
            self._break(1)
        elif tag == "pre" and node.css_first("img") is None:
            self._code(node)
        elif tag == "code" and node.css_first("img") is None:
            if words := SPACE.sub(" ", node.text()).strip():
                self._put(f"`{words}`")
        else:
            self._begin(tag, node)
            return True
        return False

    def _begin(self, tag: str, node: Any) -> None:
        self._apart(tag)
        if tag in HEADINGS:
            self._marker = (self._marker or self._indent) + HEADINGS[tag]
        elif tag == "blockquote":
            self._indents.append("> ")
        elif tag in ("ul", "ol"):
            start = node.attributes.get("start") or "1"
            self._numbers.append((int(start) if start.isdecimal() and len(start) < 10 else 1) if tag == "ol" else None)
        elif tag == "li":
            self._item()
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th") and self._rows:
            self._space |= bool(self._rows[-1])
            self._put("|")
            self._space = True
            self._rows[-1].append(tag == "th")

    def _leave(self, tag: str) -> None:
        cells: list[bool] = []
        if tag in HEADINGS:
            self._marker = ""
        elif tag == "blockquote":
            self._indents.pop()
        elif tag in ("ul", "ol"):
            self._numbers.pop()
        elif tag == "li":
            self._indents.pop()
            self._marker = ""
        elif tag == "tr" and (cells := self._rows.pop()):
            self._space = True
            self._put("|")
        self._apart(tag)
        if cells and all(cells) and not self._rows:
            self._put(f"| {' | '.join(['---'] * len(cells))} |")
            self._break(1)

    def _item(self) -> None:
        number = self._numbers[-1] if self._numbers else None
        marker = "- " if number is None else f"{number}. "
        if number is not None:
            self._numbers[-1] = number + 1
        self._marker = (self._marker or self._indent) + marker
        self._indents.append(" " * len(marker))

    def _words(self, words: str) -> None:
        plain = SPACE.sub(" ", words)
        if plain.strip(" "):
            self._space |= plain.startswith(" ")
            self._put(plain.strip(" "))
        self._space |= plain.endswith(" ")

    def _code(self, node: Any) -> None:
        """A block of code, its lines as they are."""
        code = node.first_child if node.first_child is not None and node.first_child.tag == "code" else node
        classes = " ".join(n.attributes.get("class") or "" for n in (node, code))
        language = LANGUAGE.search(classes)
        lines = node.text().strip("\n").split("\n")
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", node.text())), default=0))
        self._break(2)
        for line in (f"{fence}{language[1] if language else ''}", *(line.rstrip() for line in lines), fence):
            self._put(line)
            self._breaks = 1
        self._break(2)

    def _image(self, node: Any) -> None:
        if links := sources_of(node):
            self._taken.update(links)
            self._cut()
            caption = SPACE.sub(" ", node.attributes.get("alt") or "").strip()
            self._parts.append(Reference(links[0], caption or None, others=tuple(links[1:])))

    @property
    def _indent(self) -> str:
        return "".join(self._indents)

    def _apart(self, tag: str) -> None:
        """Before and after a block."""
        if tag in BLOCKS:
            self._break(1 if tag in ("ul", "ol") and self._numbers else BLOCKS[tag])

    def _break(self, lines: int) -> None:
        if self._rows:
            self._space = True  # a row is one line
        elif not self._marker:  # else nothing is written yet of what began
            self._outer = min(self._outer, self._indent, key=len) if self._breaks else self._indent
            self._breaks = max(self._breaks, lines)
            self._space = False

    def _put(self, words: str) -> None:
        if self._text and self._breaks:
            self._text.append("\n" if self._breaks == 1 else f"\n{self._outer.rstrip()}\n")
        if not self._text or self._breaks:
            self._text.append(self._marker or self._indent)
        elif self._space:
            self._text.append(" ")
        self._text.append(words)
        self._marker, self._breaks, self._space = "", 0, False

    def _cut(self) -> None:
        if words := "".join(self._text).strip():
            self._parts.append(Text(words))
        self._text, self._breaks, self._space = [], 0, False
