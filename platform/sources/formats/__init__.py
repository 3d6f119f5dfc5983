"""All formats that calumma reads: importing this registers them. `registry` says how one is added."""

from calumma.platform.sources.formats import conversations, interleaved, pages, text, webdataset  # noqa: F401
from calumma.platform.sources.registry import FORMATS, check_format, find_format

__all__ = ["FORMATS", "check_format", "find_format"]
