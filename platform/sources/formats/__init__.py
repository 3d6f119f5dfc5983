"""All formats that calumma reads; importing this registers them. `records/` holds what they share: the containers."""

from __future__ import annotations

from calumma.platform.sources.formats import benchmarks, text  # noqa: F401
from calumma.platform.sources.formats.conversations import reader as conversations  # noqa: F401
from calumma.platform.sources.formats.images import folders, interleaved, mmc4, pairs, webdataset  # noqa: F401
from calumma.platform.sources.formats.pages import reader as pages  # noqa: F401
from calumma.platform.sources.registry import FORMATS, check_format, find_format

__all__ = ["FORMATS", "check_format", "find_format"]
