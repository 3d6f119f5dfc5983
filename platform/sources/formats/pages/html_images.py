"""Where the picture of an <img> is: pages load their images late, in several sizes, or without scripts only.

https://html.spec.whatwg.org/multipage/images.html; the names of attributes are those of lazysizes, WordPress's plug-ins
and the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

LAZY = (
    "data-src", "data-original", "data-lazy-src", "data-lazy", "data-original-src", "data-actualsrc", "data-echo",
    "data-orig-file", "data-large-file", "data-full-src", "data-hi-res-src", "data-image",
)  # fmt: skip
LAZY_SETS = ("data-srcset", "data-lazy-srcset", "data-original-set")
MOST = 6  # places that are looked at for one image
# Types of a <source> that are decoded.
TYPES = ("", "image/jpeg", "image/jpg", "image/png", "image/webp", "image/avif", "image/gif")
_CLEAR_PIXEL = re.compile(r"data:image/gif;base64,R0lGOD(lhAQABA|dhAQABA)", re.IGNORECASE)
_LINK = re.compile(r"[\s,]*(\S+)")
_DESCRIPTOR = re.compile(r"(\d+(?:\.\d+)?)([wx])")
_NO_PATH = ("{", "[", "about:", "javascript:")


def sources_of(image: Any) -> list[str]:
    """The links to the picture of an <img>, the best first; none where it counts visitors or is but a stand-in."""
    attributes = image.attributes
    if attributes.get("width") == "1" and attributes.get("height") == "1":
        return []
    parent = image.parent
    picture = _sources_beside(image) if parent is not None and parent.tag == "picture" else []
    source = (attributes.get("src") or "").strip()
    inside = source.startswith("data:")
    links = [*_of_sets(attributes, LAZY_SETS), *_plain(attributes, LAZY)]
    links += [link for each in picture for link in _of_sets(each, LAZY_SETS)]
    links += _of_sets(attributes, ("srcset",))
    links += [source] if source not in ("", "#") and not inside and not source.startswith(_NO_PATH) else []
    links += [link for each in picture for link in _of_sets(each, ("srcset",))]
    if not links:
        beside = [each for each in _beside(image) if each.tag == "noscript"]
        links = [link for noscript in beside for each in noscript.css("img") for link in sources_of(each)]
    if not links and inside and not _CLEAR_PIXEL.match(source):
        links = [source]
    links = list(dict.fromkeys(links))
    if source not in links:
        return links[:MOST]
    # What every browser shows is the last resort, and the one that a message names.
    return [*[link for link in links if link != source][: MOST - 1], source]


def noscript_images(noscript: Any) -> list[Any]:
    """The images that a <noscript> shows where none stands beside it for the same."""
    if any(each.tag in ("img", "picture") for each in _beside(noscript)):
        return []
    return list(noscript.css("img"))


def _plain(attributes: dict[str, str | None], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value = (attributes.get(name) or "").strip()
        if value and not value.startswith(_NO_PATH):
            yield value


def _of_sets(attributes: dict[str, str | None], names: tuple[str, ...]) -> list[str]:
    return [link for value in _plain(attributes, names) for link in best_first(value)]


def best_first(srcset: str) -> list[str]:
    """The links of a `srcset`, the widest or densest first."""
    found: list[tuple[float, str]] = []
    position = 0
    while match := _LINK.match(srcset, position):
        link, position = match[1], match.end()
        size = 1.0
        if link.endswith(","):
            link = link.rstrip(",")
        else:
            end = srcset.find(",", position)
            words = srcset[position : end if end >= 0 else len(srcset)]
            position += len(words)
            if descriptor := _DESCRIPTOR.search(words):
                size = float(descriptor[1])
        if link:
            found.append((size, link))
    return [link for _, link in sorted(found, key=lambda pair: -pair[0])]


def _sources_beside(image: Any) -> list[dict[str, str | None]]:
    """Attributes of the <source>s of a <picture> that are the whole picture, in a format that is decoded."""
    return [
        source.attributes
        for source in image.parent.css("source")
        if (source.attributes.get("type") or "").lower() in TYPES and not source.attributes.get("media")
    ]


def _beside(node: Any) -> Iterator[Any]:
    """The elements directly after and before a node; of an image in a <picture>, beside that."""
    if node.tag == "img" and node.parent is not None and node.parent.tag == "picture":
        node = node.parent
    for step in ("next", "prev"):
        other = getattr(node, step)
        while other is not None and other.tag == "-text" and not (other.text_content or "").strip():
            other = getattr(other, step)
        if other is not None:
            yield other
