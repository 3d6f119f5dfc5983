"""All formats that calumma reads, a module each; importing this registers them. `records`, `rows`, `image_values`,
`exchanges`, `marks` and `html` are shared."""

from calumma.platform.sources.formats import (  # noqa: F401
    benchmarks,
    conversations,
    folders,
    interleaved,
    mmc4,
    pages,
    pairs,
    text,
    webdataset,
)
from calumma.platform.sources.registry import FORMATS, check_format, find_format

__all__ = ["FORMATS", "check_format", "find_format"]
