"""Names of files, members and places: which are hidden, and how those are written that are no UTF-8.

File systems, tar archives and JSON may hold any bytes where names are; Python keeps them as lone surrogates, which
neither JSON, Parquet nor MLflow can hold. Such a name is written with `\\xff` for a byte and `\\ud800` for a surrogate
of its own, once, where the name of a place is made; `unescaped` is the inverse.
"""

from __future__ import annotations

import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(?:\\|x[0-9a-f]{2}|u[0-9a-f]{4})")
_HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")


def escaped(name: str) -> str:
    """A name in valid Unicode; most stay as they are. Different names stay different."""
    if name.isascii() and "\\" not in name:
        return name
    if _SURROGATE.search(name) is None and _ESCAPE.search(name) is None:
        return name
    return _SURROGATE.sub(_escape, name.replace("\\", "\\\\"))


def unescaped(name: str) -> str:
    """The inverse of `escaped`."""
    return _ESCAPE.sub(_unescape, name)


def valid_words(words: str) -> str:
    """Words for a message, with escapes in place of lone surrogates."""
    return words if words.isascii() else _SURROGATE.sub(_escape, words)


def hidden_part(path: str) -> str | None:
    """What hides a path from readers: `.ipynb_checkpoints/`, `__MACOSX/`, `._*` (macOS's twins of files) or another
    name that begins with a dot. None for a path to be read."""
    *folders, name = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    for folder in folders:
        if folder.startswith(".") or folder in _HIDDEN:
            return f"{folder}/"
    if name.startswith("._"):
        return "._*"
    return name if name.startswith(".") else None


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def _unescape(match: re.Match[str]) -> str:
    escape = match[0]
    if escape == "\\\\":
        return "\\"
    return chr((0xDC00 if escape[1] == "x" else 0) + int(escape[2:], 16))
