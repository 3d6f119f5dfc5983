"""Sources: files in the formats people have, read into documents.

`registry` says how a format is added, `dataset` reads a source with Ray Data for pipelines of one's own.
"""

# Each of these modules registers its formats.
from calumma.platform.sources import conversations, interleaved, pages, text, webdataset  # noqa: F401
from calumma.platform.sources.files import BadInput, Document, Draft, File, Item, Malformed, Reference
from calumma.platform.sources.registry import (
    FORMATS,
    Format,
    Found,
    check,
    find,
    list_source,
    name_of,
    read_file,
    read_source,
    reader,
    require_files,
)

__all__ = [
    "FORMATS",
    "BadInput",
    "Document",
    "Draft",
    "File",
    "Format",
    "Found",
    "Item",
    "Malformed",
    "Reference",
    "check",
    "find",
    "list_source",
    "name_of",
    "read_file",
    "read_source",
    "reader",
    "require_files",
]
