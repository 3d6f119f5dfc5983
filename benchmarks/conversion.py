"""Memory and speed of converting large checkpoints: `python benchmarks/conversion.py --preset chameleon-7b`.

Writes random bfloat16 weights of a preset's shape in Meta's layout, in shards as of up to four GPUs, and takes them
through `calumma import meta`, `export hf` and `import hf`, each a process of its own. Peak memory is what a process
holds besides files (RssAnon in Linux' /proc): pages of a mapped checkpoint are the kernel's to drop. Needs free disk
for three copies of the model, twice its size at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
import torch
import yaml
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from calumma.model.config import PRESETS, ImageTokenizerConfig, ModelConfig
from calumma.model.convert.names import rows, shapes
from calumma.model.tokenizers.image import ImageTokenizer

CODES = 8192
GIGABYTE = 1e9


def write_release(folder: Path, config: ModelConfig) -> tuple[Path, float]:
    """The release's download, models/NAME and tokenizer/; returns the former, and the bytes of its largest shard."""
    source, beside = folder / "models" / "random", folder / "tokenizer"
    source.mkdir(parents=True)
    beside.mkdir()
    model = {"dim": config.width, "n_layers": config.layers, "n_heads": config.heads, "n_kv_heads": config.kv_heads}
    model |= {"qk_normalization": True, "swin_norm": config.norm_order == "swin"}
    (source / "params.json").write_text(json.dumps({"model": model}))
    parallel = min(4, config.kv_heads)
    (source / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": parallel}))
    ours = shapes(config)
    for rank in range(parallel):
        shard: dict[str, Tensor] = {}
        for row in rows(config):
            shape = list(ours[row.ours])
            if row.shards in ("rows", "columns"):
                shape[0 if row.shards == "rows" else 1] //= parallel
            shard[row.meta] = noise(shape[1:] if row.shards == "heads" else shape)
        torch.save(shard, source / f"consolidated.{rank:02d}.pth")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    special += ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z" for code in range(CODES)]
    special += ["<eoss>", "<racm3:break>", *(f"<reserved{number:05d}>" for number in range(8704, 8720))]
    names = [*special, *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(beside / "text_tokenizer.json"))
    image = ImageTokenizer(ImageTokenizerConfig())
    state = {name.replace("codebook.", "quantize.embedding."): value for name, value in image.state_dict().items()}
    torch.save({"state_dict": state}, beside / "vqgan.ckpt")
    (beside / "vqgan.yaml").write_text(yaml.safe_dump(VQGAN))
    return source, max(path.stat().st_size for path in source.glob("*.pth"))


VQGAN = {
    "model": {
        "params": {
            "embed_dim": 256,
            "n_embed": CODES,
            "ddconfig": {
                "double_z": False,
                "z_channels": 256,
                "resolution": 512,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 128,
                "ch_mult": [1, 1, 2, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        }
    }
}


def noise(shape: list[int]) -> Tensor:
    """Random bfloat16 numbers; of large tensors a small block of them, over and over."""
    size = 1
    for length in shape:
        size *= length
    block = (torch.randn(min(size, 1 << 20)) * 0.02).bfloat16()
    return block.repeat(-(-size // len(block)))[:size].reshape(shape)


def convert(*arguments: str) -> tuple[float, int]:
    """Seconds and peak bytes of `calumma ARGUMENTS`."""
    began, peak = time.perf_counter(), 0
    command = [str(Path(sys.executable).with_name("calumma")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                text = status.read_text()
            except OSError:
                break
            found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(value) * 1024 for value in found)])
            time.sleep(0.02)
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"calumma {' '.join(arguments)} failed: {errors[-2000:]}")
    return time.perf_counter() - began, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="calumma-1.3b")
    parser.add_argument("--shard-gib", type=float, default=2.0, help="size of the files that are written")
    parser.add_argument("--directory", type=Path, help="where to work; default: the system's folder for such files")
    given = parser.parse_args()
    config = ModelConfig(**PRESETS[given.preset] | {"vocabulary_size": 65536, "dropout": 0.0})
    largest = 2 * max(torch.Size(shape).numel() for shape in shapes(config).values())
    with tempfile.TemporaryDirectory(dir=given.directory, prefix="calumma-") as name:
        folder = Path(name)
        source, shard = write_release(folder, config)
        size = sum(path.stat().st_size for path in source.glob("*.pth"))
        print(f"{given.preset}: {size / GIGABYTE:.1f} GB in bfloat16; its largest tensor has {largest / GIGABYTE:.2f}")
        print(f"GB, a shard of the source {shard / GIGABYTE:.2f} GB.\n")
        print("| conversion | seconds | GB/s | peak memory | over a shard |\n| --- | --- | --- | --- | --- |")
        ours, theirs, again = (str(folder / name) for name in ("ours", "hugging_face", "again"))
        options = ("--shard-gib", str(given.shard_gib))
        for label, arguments, done_with in (
            ("import meta", ("import", "meta", str(source), ours), source.parents[0]),
            ("export hf", ("export", "hf", ours, theirs), Path(ours)),
            ("import hf", ("import", "hf", theirs, again), Path(theirs)),
        ):
            seconds, peak = convert(*arguments, *options)
            if label != "import meta":
                shard = given.shard_gib * 2**30
            rates = f"{seconds:.0f} | {size / seconds / GIGABYTE:.2f} | {peak / GIGABYTE:.2f} GB | {peak / shard:.2f}"
            print(f"| {label} | {rates} |", flush=True)
            shutil.rmtree(done_with)


if __name__ == "__main__":
    main()
