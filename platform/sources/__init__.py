"""Sources: files in the formats people have, read into documents.

`formats/` holds a module a format, and `registry` says how one is added; `reading` reads a file, `dataset` a source
with Ray Data for pipelines of one's own. What a reader of one's own needs can be imported from here:
`from calumma.platform.sources import reader`.
"""

from __future__ import annotations

import importlib
from typing import Any

# Imported when it is used: specifications name sources, and reading needs Pillow and numpy.
_PUBLIC = {
    **dict.fromkeys(("BadInput", "Draft", "File", "Item", "Malformed", "Reference"), "files"),
    "Notes": "notes",
    **dict.fromkeys(("FORMATS", "Format", "ReaderItem", "reader"), "registry"),
    **dict.fromkeys(("check_format", "find_format"), "formats"),
    **dict.fromkeys(("list_source", "name_of", "read_file", "read_source", "require_files"), "reading"),
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
