"""All formats that calumma reads, a module each; importing this registers them. `rows` and `html` are shared."""

from calumma.platform.sources.formats import conversations, interleaved, pages, text, webdataset  # noqa: F401
from calumma.platform.sources.registry import FORMATS, check_format, find_format

__all__ = ["FORMATS", "check_format", "find_format"]
