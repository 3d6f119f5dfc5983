"""A source as a Ray dataset of documents, for pipelines of one's own:

    source = Source(name="wiki", format="text", location="s3://bucket/wiki/")
    documents = read(source).map(lambda row: ...)

Each row is `Document.to_row()` and the `name` of the place that it comes from; `Document.from_row` is the inverse. A
task reads one file, a block at a time; the order is that of the files' names and of the documents in them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.shards import documents as document_shards
from calumma.platform.sources.files import BadInput
from calumma.platform.sources.notes import Notes, sentences
from calumma.platform.sources.reading import name_of, read_source, require_files
from calumma.platform.sources.specification import Source

if TYPE_CHECKING:
    from pyarrow import Schema, Table
    from ray.data import Dataset

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 << 20  # bytes of texts and images
BLOCK_ROWS = 4096


class UnreadableInput(ValueError):
    """A file holds something that is no document; the message names the place."""


def read(
    source: Source, root: str | None = None, bad: Literal["skip", "raise"] = "skip", block: int = BLOCK_BYTES
) -> Dataset:
    """The documents of a source, in order, in blocks of so many bytes. Relative locations are below `root` or the
    working folder.

    What is bad is logged and left out, or an UnreadableInput where the dataset is consumed. Raises SpecificationError
    when the source has no files, and StorageError.
    """
    import ray
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def locate(location: str) -> str:
        absolute = "://" in location or root is None or Path(location).is_absolute()
        return location if absolute else storage.join(root or "", location)

    source = source.model_copy(
        update={"location": locate(source.location), "images": locate(source.images) if source.images else None}
    )
    files, _ = require_files(source)

    class Files(Datasource):
        def get_name(self) -> str:
            return f"{source.format}:{source.name}"

        def estimate_inmemory_data_size(self) -> int | None:
            return sum(files.values())

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    partial(_blocks, source, uri, bad, block),
                    BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=(uri,)),
                    schema=schema(),
                    per_task_row_limit=per_task_row_limit,
                )
                for uri, size in files.items()
            ]

    dataset = ray.data.read_datasource(Files(), override_num_blocks=len(files))
    dataset.context.execution_options.preserve_order = True
    return dataset


def schema() -> Schema:
    """The Arrow schema of the rows."""
    import pyarrow as pa

    return document_shards.schema().append(pa.field("name", pa.string()))


def _blocks(source: Source, uri: str, bad: Literal["skip", "raise"], block: int) -> Iterator[Table]:
    import pyarrow as pa

    rows: list[dict[str, Any]] = []
    size, notes = 0, Notes()
    for item in read_source(source, uri, notes=notes):
        if isinstance(item, BadInput):
            if bad == "raise":
                raise UnreadableInput(f"{item.name}: {item.reason}")
            logger.warning("left out %s: %s", item.name, item.reason)
            continue
        if (rows and size + _content_bytes(item) > block) or len(rows) == BLOCK_ROWS:
            yield pa.Table.from_pylist(rows, schema())
            rows, size = [], 0
        rows.append({**item.to_row(), "name": name_of(item)})
        size += _content_bytes(item)
    for line in [f"{place}: {what}" for place, what in notes.warnings] + sentences(notes.report()):
        logger.warning("%s: %s", uri, line)
    yield pa.Table.from_pylist(rows, schema())  # also without rows: Ray Data wants a block of every task


def _content_bytes(document: Document) -> int:
    sizes = 0
    for segment in document.segments:
        if isinstance(segment, Text):
            sizes += len(segment.text)
        elif isinstance(segment, Image) and isinstance(segment.data, bytes):
            sizes += len(segment.data)
    return sizes
