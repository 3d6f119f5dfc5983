"""Checksums of benchmarks' files as others have published them, and whether a file is one of these.

Each stands in public code that downloads the file from its publisher: tensorflow_datasets' lists (HellaSwag, BoolQ),
ParlAI's (SQuAD), torchvision's (MNIST, as MD5); those of GSM8K and of the hub's Parquet files (ARC, OpenBookQA) in
several projects that pin them, which agree. Files without an entry are of publishers who give none that we know.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from calumma.platform import storage
from calumma.platform.storage.manifest import sha256

Verdict = Literal["published", "other", "unknown"]
MD5_LENGTH = 32  # hexadecimal digits; SHA-256 has 64

# Benchmark -> the end of a file's path -> its checksum.
PUBLISHED: dict[str, dict[str, str]] = {
    "hellaswag": {
        "hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
        "hellaswag_train.jsonl": "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
        "hellaswag_test.jsonl": "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261",
    },
    "arc_easy": {
        "ARC-Easy/test-00000-of-00001.parquet": "4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177"
    },
    "arc_challenge": {
        "ARC-Challenge/test-00000-of-00001.parquet": "62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9",
        "ARC-Challenge/train-00000-of-00001.parquet": (
            "e488c1587ffdcfc8443f916c53488a95cd471c5790e0746c6bfe4cecf20962cb"
        ),
        "ARC-Challenge/validation-00000-of-00001.parquet": (
            "395a5c88d1580d69855fbaee9450270578df1ad5af6259771cd0a42c20e99f05"
        ),
    },
    "openbookqa": {
        "main/test-00000-of-00001.parquet": "cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3"
    },
    "boolq": {
        "dev.jsonl": "ebc29ea3808c5c611672384b3de56e83349fe38fc1fe876fd29b674d81d0a80a",
        "train.jsonl": "cc7a79d44479867e8323a7b0c5c1d82edf516ca34912201f9384c3a3d098d8db",
    },
    "gsm8k": {
        "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    },
    "squad": {
        "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
        "dev-v2.0.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
        "train-v2.0.json": "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}


def verdict(benchmark: str, path: str, uri: str, digest: str | None = None) -> Verdict:
    """Of the file at `uri`, which stands at `path` below its benchmark's folder; `digest`: its SHA-256, where known.

    Raises StorageError."""
    for end, wanted in PUBLISHED.get(benchmark, {}).items():
        if path == end or path.endswith(f"/{end}"):
            found = _md5(uri) if len(wanted) == MD5_LENGTH else digest or sha256(uri)
            return "published" if found == wanted else "other"
    return "unknown"


def _md5(uri: str) -> str:
    return hashlib.md5(storage.read_bytes(uri), usedforsecurity=False).hexdigest()
