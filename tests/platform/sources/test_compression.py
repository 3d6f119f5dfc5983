"""Compressed files: what is read of whole ones, and of those that are cut, damaged or followed by something else."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from calumma.model.document import Document
from calumma.platform.sources import compression
from calumma.platform.sources.compression import codecs
from calumma.platform.sources.files import BadInput, Item
from calumma.platform.sources.notes import Notes
from calumma.platform.sources.reading import read_file

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, stream: bool = False) -> bytes:
    """A zip file; as `stream`, with the sizes behind the entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(_Pipe(buffer) if stream else buffer, "w", method) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class _Pipe:
    """What can only be written to."""

    def __init__(self, target: io.BytesIO) -> None:
        self.write, self.flush = target.write, target.flush


WORDS = [f"{n} {random.Random(n).randbytes(300).hex()}" for n in range(300)]

MANY = [f"{n} {random.Random(n).randbytes(300).hex()}" for n in range(3000)]


def lines(words: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in words).encode()


def read(path: Path, content: bytes) -> tuple[list[str], list[BadInput], Notes]:
    path.write_bytes(content)
    notes = Notes()
    items: list[Item] = list(read_file("text", "source", str(path), notes=notes))
    texts = [item.text for item in items if isinstance(item, Document)]
    return texts, [item for item in items if isinstance(item, BadInput)], notes


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("tail", [b"\0" * 1024, b"\0" * 100_000, b"uploaded by x\n", b"\0" * 7 + b"signature"])
def test_what_follows_the_end_is_ignored_with_a_warning(tmp_path: Path, packed: str, tail: bytes) -> None:
    texts, bad, notes = read(tmp_path / f"a.jsonl{packed}", PACK[packed](lines(WORDS)) + tail)
    assert (texts, bad) == (WORDS, [])
    if packed == ".xz" and not tail.strip(b"\0"):
        assert notes.warned == 0  # its padding
    else:
        assert notes.warned == 1
        assert "after its end are ignored" in notes.warnings[0][1]


@pytest.mark.parametrize("packed", PACK)
def test_members_one_after_another_are_one_content(tmp_path: Path, packed: str) -> None:
    pack = PACK[packed]
    content = pack(lines(WORDS[:100])) + pack(b"") + pack(lines(WORDS[100:]))
    assert read(tmp_path / f"a.jsonl{packed}", content) == (WORDS, [], Notes())


@pytest.mark.parametrize("packed", PACK)
def test_a_damaged_member_costs_no_other(tmp_path: Path, packed: str) -> None:
    pack = PACK[packed]
    first, second, third = (pack(lines(WORDS[n : n + 100])) for n in (0, 100, 200))
    middle = bytearray(second)
    middle[len(second) // 2 : len(second) // 2 + 8] = b"\xff" * 8
    texts, bad, _ = read(tmp_path / f"a.jsonl{packed}", first + middle + third)
    assert sum(text not in WORDS for text in texts) <= 3  # what a damaged byte means may still be text
    assert (texts[:100], texts[-100:]) == (WORDS[:100], WORDS[-100:])
    assert any("damaged here" in b.reason and b.bytes_lost for b in bad)
    for place in (0, 1, 2):
        begun = bytearray(second)
        begun[place] ^= 0x10
        texts, bad, _ = read(tmp_path / f"a.jsonl{packed}", first + begun + third)
        assert (texts[:100], texts[-100:]) == (WORDS[:100], WORDS[-100:])
        assert len(texts) == 300 or any(b.bytes_lost for b in bad)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_everything_before_an_error_is_read(tmp_path: Path, packed: str) -> None:
    whole = bytearray(PACK[packed](lines(MANY)))
    place = len(whole) * 9 // 10
    whole[place : place + 8] = b"\xff" * 8
    texts, (damage, *_), _ = read(tmp_path / f"a.jsonl{packed}", bytes(whole))
    # gzip: all but the line that is damaged, or what 8 bytes mean; zstd: all but a block.
    assert len(texts) >= 0.9 * len(MANY) - (5 if packed == ".gz" else 250)
    # What a damaged byte means may still be text: the checksum would tell.
    assert sum(a != b for a, b in zip(texts, MANY, strict=False)) <= 2
    assert "from here on" in damage.reason


def test_the_checksum_at_the_end_of_a_stream_is_checked(tmp_path: Path) -> None:
    for packed in (".gz", ".zst", ".xz", ".bz2"):
        whole = bytearray(PACK[packed](lines(WORDS)))
        whole[-6 if packed == ".gz" else -2] ^= 1
        texts, bad, _ = read(tmp_path / f"a.jsonl{packed}", bytes(whole))
        assert texts[:290] == WORDS[:290]
        assert sum(b.bytes_lost for b in bad) > 0


def test_long_windows_are_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
        buffer = io.BytesIO()
        with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(buffer, closefd=False) as writer:
            writer.write(lines(WORDS))
        return buffer.getvalue()

    assert read(tmp_path / "a.jsonl.zst", packed(31)) == (WORDS, [], Notes())
    monkeypatch.setattr(codecs, "LONGEST_WINDOW", 1 << 27)
    assert read(tmp_path / "a.jsonl.zst", packed(27)) == (WORDS, [], Notes())
    texts, (bad,), _ = read(tmp_path / "a.jsonl.zst", packed(28))
    assert texts == []
    assert "asks for a window of 256 MiB; at most 128 are read; compress it again with zstd --long=27" in bad.reason
    assert bad.bytes_lost > 0


def test_a_small_file_that_fills_the_memory_when_unpacked_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    zeros = b"0" * (64 << 20)
    for packed in (".gz", ".zst"):
        with io.BytesIO(PACK[packed](zeros)) as raw:
            stream = compression.DecompressedStream(raw, compression.SUFFIXES[packed], print)
            sizes = [len(part) for part in iter(lambda: stream.read(1 << 20), b"")]  # noqa: B023
        assert sum(sizes) == len(zeros)
        assert max(sizes) <= 1 << 20


def test_names_of_packed_archives_say_how_they_are_packed() -> None:
    assert compression.codec_of(b"", "s3://b/x.TGZ") == "gzip"
    assert compression.codec_of(b"", "a.tar.bz2") == "bzip2"
    assert compression.codec_of(b"BZhello, this is text", "a.txt") is None
    assert compression.codec_of(bz2.compress(b"x"), "a.txt") == "bzip2"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_records_of_a_zip_file_are_read_entry_by_entry(tmp_path: Path, method: int) -> None:
    half = len(WORDS) // 2
    files = {
        "shards/": b"",
        "shards/0.jsonl": lines(WORDS[:half]).rstrip(b"\n"),
        "README.md": b"# about",
        "__MACOSX/shards/._0.jsonl": b"\0",
        "shards/1.json": lines(WORDS[half:]),
    }
    texts, bad, notes = read(tmp_path / "a.jsonl.zip", zipped(files, method))
    assert (texts, bad) == (WORDS, [])
    assert [what for _, what in notes.warnings] == [
        "README.md in it is not read",
        "__MACOSX/shards/._0.jsonl in it is not read",
    ]


def test_zip_files_that_were_written_as_a_stream_are_read(tmp_path: Path) -> None:
    content = zipped({"a.jsonl": lines(WORDS[:9]), "b.jsonl": lines(WORDS[9:])}, stream=True)
    assert read(tmp_path / "a.jsonl.zip", content) == (WORDS, [], Notes())
    texts, bad, _ = read(tmp_path / "a.jsonl.zip", content[:-3000])
    assert texts == WORDS[: len(texts)] != []
    assert len(bad) == 1
    assert "cut off" in bad[0].reason


def test_what_of_a_zip_file_cannot_be_read_is_told(tmp_path: Path) -> None:
    _, bad, _ = read(tmp_path / "a.jsonl.zip", zipped({"a.jsonl": lines(WORDS)}, zipfile.ZIP_BZIP2))
    assert "a.jsonl is packed by method 12; pack it again" in bad[0].reason
    secret = bytearray(zipped({"a.jsonl": lines(WORDS)}))
    secret[6] |= 1
    assert "a.jsonl is encrypted" in read(tmp_path / "a.jsonl.zip", bytes(secret))[1][0].reason
    assert read(tmp_path / "a.jsonl.zip", zipped({})) == ([], [], Notes())
