"""The other side of `benchmarks/data.py`: MosaicML Streaming and WebDataset, in their own virtual environment.

    python benchmarks/data_rivals.py write mds|wds SOURCE.npz TARGET [zstd]
    python benchmarks/data_rivals.py read  mds|wds LOCATION LOCAL ROWS EPOCHS WORKERS      # prints one line of JSON

Both hold what our token shards hold, a sequence a sample: int32 tokens and document numbers. The loss mask of plain
documents follows from the latter, here as there. What is read ends as int64 and bool tensors of ROWS sequences.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def streaming() -> Any:
    """The package; without torchvision where that is built for another PyTorch: only its image datasets need it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__dict__.update(VisionDataset=object, to_tensor=None)
    import streaming as package

    return package


def collate(samples: list[dict[str, np.ndarray]]) -> Batch:
    tokens = torch.from_numpy(np.stack([sample["tokens"] for sample in samples])).long()
    segments = torch.from_numpy(np.stack([sample["segments"] for sample in samples])).long()
    return tokens, segments >= 0, segments


def write_mds(data: dict[str, np.ndarray], target: str, compression: str | None) -> None:
    length = data["tokens"].shape[1]
    columns = dict.fromkeys(("tokens", "segments"), f"ndarray:int32:{length}")
    with streaming().MDSWriter(out=target, columns=columns, compression=compression, size_limit=1 << 26) as writer:
        for row in range(len(data["tokens"])):
            writer.write({name: data[name][row] for name in columns})


def write_wds(data: dict[str, np.ndarray], target: str, compression: str | None) -> None:
    import webdataset

    Path(target).mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{target}/%06d.tar", maxsize=1 << 26, verbose=0) as writer:
        for row in range(len(data["tokens"])):
            arrays = {f"{name}.npy": data[name][row] for name in ("tokens", "segments")}
            writer.write({"__key__": f"{row:08d}", **arrays})


def mds(location: str, local: str, rows: int, epochs: int, workers: int) -> Iterator[Batch]:
    package = streaming()
    package.base.util.clean_stale_shared_memory()
    remote = location if "://" in location else None
    dataset = package.StreamingDataset(
        remote=remote, local=local if remote else location, shuffle=True, shuffle_seed=1, batch_size=rows
    )
    loader = DataLoader(
        dataset, batch_size=rows, num_workers=workers, collate_fn=collate, drop_last=True, persistent_workers=True
    )
    for _ in range(epochs):
        yield from loader


def wds(location: str, local: str, rows: int, epochs: int, workers: int) -> Iterator[Batch]:
    import webdataset

    if "://" in location:
        import boto3

        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        client = boto3.client("s3")
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        sign = client.generate_presigned_url
        urls = [
            f"pipe:curl -s '{sign('get_object', Params={'Bucket': bucket, 'Key': item['Key']})}'" for item in listed
        ]
    else:
        urls = sorted(str(path) for path in Path(location).glob("*.tar"))

    def decoded(sample: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.load(io.BytesIO(sample[f"{name}.npy"])) for name in ("tokens", "segments")}

    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1, workersplitter=webdataset.split_by_worker)
    dataset = dataset.repeat(epochs).shuffle(256).map(decoded).batched(rows, collation_fn=collate, partial=False)
    yield from DataLoader(dataset, batch_size=None, num_workers=min(workers, len(urls)))


def main() -> None:
    action, kind, *rest = sys.argv[1:]
    if action == "write":
        source, target, *compression = rest
        with np.load(source) as data:
            {"mds": write_mds, "wds": write_wds}[kind](dict(data), target, compression[0] if compression else None)
        return
    location, local, rows, epochs, workers = rest
    if kind == "mds":
        streaming()  # imports take no part
    else:
        import webdataset  # noqa: F401
    began = time.perf_counter()
    first, tokens, seen = 0.0, 0, 0
    for batch, _, _ in {"mds": mds, "wds": wds}[kind](location, local, int(rows), int(epochs), int(workers)):
        seen += batch.numel()
        if not first:
            first = time.perf_counter()
            tokens = -batch.numel()
        tokens += batch.numel()
    ended = time.perf_counter()
    print(json.dumps({"first": first - began, "tokens": tokens, "seconds": ended - first, "seen": seen}))
    sys.stdout.flush()
    os._exit(0)  # Streaming's workers and shared memory are slow to go


if __name__ == "__main__":
    main()
