"""Object storage: one set of functions over `s3://bucket/key` URIs and local paths (plain or `file://`); `gs://`
and `az://` as well, and `hf://`, which is only read (filesystems.py).

Readers see a whole object or none; a directory is published by its `manifest.json`, which copies write last and
deletions remove first. Every failure is a StorageError. `manifest` and `publishing` are imported by name.
"""

from calumma.platform.storage.files import (
    ContentCheck,
    age,
    copy_to,
    create,
    exists,
    files_beside,
    list_files,
    open_read,
    read_bytes,
    read_range,
    size,
    sizes,
    write_bytes,
)
from calumma.platform.storage.folders import check_writable, delete, download, local_copy, upload
from calumma.platform.storage.inputs import Listing, list_inputs, literal_folder
from calumma.platform.storage.uri import (
    MANIFEST,
    Damaged,
    NotFound,
    StorageError,
    is_remote,
    join,
    local_path,
    relative,
)

__all__ = [
    "MANIFEST",
    "ContentCheck",
    "Damaged",
    "Listing",
    "NotFound",
    "StorageError",
    "age",
    "check_writable",
    "copy_to",
    "create",
    "delete",
    "download",
    "exists",
    "files_beside",
    "is_remote",
    "join",
    "list_files",
    "list_inputs",
    "literal_folder",
    "local_copy",
    "local_path",
    "open_read",
    "read_bytes",
    "read_range",
    "relative",
    "size",
    "sizes",
    "upload",
    "write_bytes",
]
