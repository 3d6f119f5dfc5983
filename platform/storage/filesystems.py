"""Object storage that is not S3's kind: `gs://bucket/key` (Google Cloud Storage), `az://container/key` (Azure), and
`hf://datasets/ORG/NAME[@revision]/path` (Hugging Face's hub), which is only read.

Through huggingface_hub and Arrow's file systems, with credentials from the variables that their own clients read:
HF_TOKEN and HF_ENDPOINT; GOOGLE_APPLICATION_CREDENTIALS, and STORAGE_EMULATOR_HOST for a server of one's own;
AZURE_STORAGE_ACCOUNT with AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, and AZURITE_BLOB_STORAGE_HOST.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast

from calumma.platform.storage.uri import BrokenRead, NotFound, StorageError

ADVICE = {
    "hf": "check the name and the revision, HF_TOKEN for what is private or gated, HF_ENDPOINT and the network",
    "gs": "check the bucket, GOOGLE_APPLICATION_CREDENTIALS and the network",
    "az": "check the container, AZURE_STORAGE_ACCOUNT, AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, and the network",
}
VARIABLES = ("HF_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "AZUR")
COPY_BYTES = 4 << 20
GIVE_UP = timedelta(seconds=30)  # a request to Google's storage


def sizes(uri: str) -> Iterator[tuple[str, int]]:
    """(URI, bytes) of the files below a folder, or of the one file; none where there is none."""
    scheme, _, path = uri.partition("://")
    path = path.strip("/")
    if scheme == "hf":
        # `find` finds nothing, and raises nothing, where there is no such folder.
        for name, entry in _hub().find(path, detail=True, refresh=True).items():
            if entry["type"] == "file":
                yield f"hf://{name}", entry["size"]
        return
    import pyarrow.fs as fs

    mounted = _arrow(scheme)
    entry = mounted.get_file_info(path)
    if entry.type == fs.FileType.File:
        yield f"{scheme}://{path}", entry.size
    for entry in mounted.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True)):
        if entry.type == fs.FileType.File:
            yield f"{scheme}://{entry.path}", entry.size


def size(uri: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    scheme, _, path = uri.partition("://")
    if scheme == "hf":
        entry = _hub().info(path)
        if entry["type"] != "file":
            raise FileNotFoundError(path)
        return int(entry["size"])
    import pyarrow.fs as fs

    found = _arrow(scheme).get_file_info(path)
    if found.type != fs.FileType.File:
        raise FileNotFoundError(path)
    return int(found.size)


def age(uri: str) -> float:
    """Seconds since a file was written. Raises FileNotFoundError."""
    import pyarrow.fs as fs

    scheme, _, path = uri.partition("://")
    entry = _arrow(scheme).get_file_info(path.strip("/"))
    if entry.type != fs.FileType.File:
        raise FileNotFoundError(uri)
    return max(0.0, time.time() - entry.mtime_ns / 1e9)


def open_file(uri: str, buffer: int) -> io.BufferedIOBase:
    """A seekable file. Of the hub it is read `buffer` bytes a request; others are copied to a temporary file first,
    since Python's files of Arrow call themselves closed at their end (25.0). Raises FileNotFoundError."""
    scheme, _, path = uri.partition("://")
    if scheme == "hf":
        return io.BufferedReader(cast(Any, _hub().open(path, "rb", block_size=buffer)), buffer)
    import pyarrow.fs as fs

    with tempfile.TemporaryDirectory(prefix="calumma-") as folder:
        copy = Path(folder, "copy")
        here = fs.LocalFileSystem()
        fs.copy_files(path, str(copy), source_filesystem=_arrow(scheme), destination_filesystem=here, use_threads=False)
        return copy.open("rb")  # lives until it is closed


def write(uri: str, content: BinaryIO) -> None:
    """Write a whole file, from its beginning; readers see the old content or the new. Raises OSError."""
    scheme, _, path = uri.partition("://")
    mounted = _arrow(scheme)
    # Google's storage shows an upload when it is finished. Azure's, through Arrow, shows an empty file while it is
    # written: it goes to another name first, and is copied within the storage.
    target = path if scheme == "gs" else f"{path}.{uuid.uuid4().hex}.tmp"
    with mounted.open_output_stream(target) as stream:
        shutil.copyfileobj(content, stream, COPY_BYTES)
    if target != path:
        try:
            mounted.copy_file(target, path)
        finally:
            mounted.delete_file(target)


def delete(uri: str) -> None:
    """Delete a file; nothing there is fine."""
    scheme, _, path = uri.partition("://")
    with suppress(FileNotFoundError):
        _arrow(scheme).delete_file(path)


def read_range(uri: str, offset: int, length: int) -> bytes:
    """One attempt. Raises BrokenRead, and FileNotFoundError."""
    scheme, _, path = uri.partition("://")
    try:
        # Of Google's storage the whole file is read: Arrow's ranges of large ones never come to an end (25.0).
        with closing(_arrow(scheme).open_input_file(path) if scheme == "az" else open_file(uri, length or 1)) as file:
            file.seek(offset)
            data: bytes = file.read(length)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BrokenRead(f"{uri} is not answered, or not to the end ({error})") from error
    if len(data) != length:
        raise BrokenRead(f"{len(data):,} bytes came where {length:,} were asked for")
    return data


def translate_error(uri: str, action: str, error: Exception) -> StorageError | None:
    """The StorageError of what these libraries raise; None for what is none of theirs."""
    scheme = uri.partition("://")[0]
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:  # else the repository is not there
        return NotFound(f"cannot {action} {uri}: there is no such file or folder")
    told = " ".join(str(error.__cause__ or error).split())[:500]
    library = type(error).__module__
    if isinstance(error, OSError | ValueError | NotImplementedError) or library.startswith(("huggingface_hub", "http")):
        return StorageError(f"cannot {action} {uri}: {told}; {ADVICE[scheme]}")
    return None


def _hub() -> Any:
    return _hub_for(os.getpid(), os.environ.get("HF_ENDPOINT"), os.environ.get("HF_TOKEN"))


@functools.lru_cache(maxsize=4)
def _hub_for(process: int, endpoint: str | None, token: str | None) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint, token=token, skip_instance_cache=True)


def _arrow(scheme: str) -> Any:
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(VARIABLES)))
    return _arrow_for(os.getpid(), scheme, settings)


@functools.lru_cache(maxsize=4)
def _arrow_for(process: int, scheme: str, settings: tuple[tuple[str, str], ...]) -> Any:
    import pyarrow.fs as fs

    given = dict(settings)
    if scheme == "gs":
        emulator = given.get("STORAGE_EMULATOR_HOST", "")
        form, _, host = emulator.rpartition("://")
        server = {"anonymous": True, "scheme": form or "http", "endpoint_override": host} if host else {}
        return fs.GcsFileSystem(retry_time_limit=GIVE_UP, **server)
    account = given.get("AZURE_STORAGE_ACCOUNT") or given.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise StorageError("az:// needs the name of the account: set AZURE_STORAGE_ACCOUNT")
    emulated: dict[str, str] = {}
    if address := given.get("AZURITE_BLOB_STORAGE_HOST"):
        form, _, authority = address.rpartition("://")
        emulated = {f"{api}_storage_authority": authority for api in ("blob", "dfs")}
        emulated |= {f"{api}_storage_scheme": form or "http" for api in ("blob", "dfs")}
    key = given.get("AZURE_STORAGE_KEY") or given.get("AZURE_STORAGE_ACCOUNT_KEY")
    return fs.AzureFileSystem(account, account_key=key, sas_token=given.get("AZURE_STORAGE_SAS_TOKEN"), **emulated)
