"""A Parquet file of which only some bytes are at hand, read with metadata that are already known."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData


class PartialFile:
    """As pyarrow wants to read it. Raises ValueError where it reads before the bytes that are held."""

    closed = False

    def __init__(self, size: int) -> None:
        """`size`: bytes of the whole file."""
        self._size = size
        self._place = 0
        self.set_bytes(b"", 0)

    def set_bytes(self, data: bytes, offset: int) -> None:
        """Have these bytes at hand, and no others."""
        self._data, self._offset = memoryview(data), offset

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, length: int = -1) -> memoryview:
        begin = self._place - self._offset
        if begin < 0:
            raise ValueError(f"bytes before {self._offset} are not at hand")
        found = self._data[begin : begin + length]
        self._place += len(found)
        return found

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        pass


def extent(metadata: FileMetaData, row_group: int) -> tuple[int, int]:
    """Where a row group begins and ends in its file: from its first column chunk's start to the last one's end."""
    group = metadata.row_group(row_group)
    columns = [group.column(n) for n in range(group.num_columns)]
    begins = [min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in columns]
    return min(begins), max(begin + c.total_compressed_size for begin, c in zip(begins, columns, strict=True))
