"""Image tokenizer at the published shape: encode and decode, beside transformers' VQ encoder with the same weights and
beside what this machine's matrix multiplication and convolution can do, all in one process.

    python benchmarks/image_tokenizer.py                       # CPU, or CUDA where there is one
    python benchmarks/image_tokenizer.py --resolution 256 --batch 4 --repeats 9

Codes are compared, so a faster encoder that codes otherwise would show. FLOPs are those that were executed.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from calumma.model.config import ImageTokenizerConfig
from calumma.model.convert.image_tokenizer import HUGGING_FACE_PREFIX, hugging_face_names
from calumma.model.tokenizers.image import ImageTokenizer

Work = Callable[[], object]


def build(resolution: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, ImageTokenizer]:
    """transformers' VQ encoder with random weights, and ours, whole, whose encoder has the same."""
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    torch.manual_seed(0)
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(resolution=resolution)).eval()
    ours = ImageTokenizer(ImageTokenizerConfig(resolution=resolution)).eval()
    weights = theirs.state_dict()
    names = hugging_face_names(ours.config)
    shared = {name: weights[other.removeprefix(HUGGING_FACE_PREFIX)] for name, other in names.items()}
    ours.load_state_dict(ours.state_dict() | shared)
    return theirs.to(device, dtype), ours.to(device, dtype)


def pictures(batch: int, resolution: int) -> Tensor:
    """Smooth random colours with a white border, as photographs in prompts have. FloatTensor [B, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 16, 16, generator=generator) * 2 - 1
    fine = torch.randn(batch, 3, resolution, resolution, generator=generator) * 0.05
    smooth = F.interpolate(coarse, size=(resolution, resolution), mode="bicubic") + fine
    smooth[:, :, : resolution // 8] = 1
    return smooth.clamp(-1, 1)


def seconds(work: dict[str, Work], device: torch.device, repeats: int) -> dict[str, float]:
    """Median time of each; they take turns, so that a slow moment of the machine meets all alike."""

    def once(run: Work) -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for run in work.values():
        once(run)
    times = [{name: once(run) for name, run in work.items()} for _ in range(repeats)]
    return {name: median(t[name] for t in times) for name in work}


def flops(run: Work) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ceilings(resolution: int, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """The machine's own limits: a square matrix product, and the encoder's most frequent convolution."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    size = resolution // 2
    x = torch.randn(1, 128, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype)
    return {"matmul ceiling": lambda: a @ b, "convolution ceiling": lambda: F.conv2d(x, weight, padding=1)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    theirs, ours = build(given.resolution, device, dtype)
    x = pictures(given.batch, given.resolution).to(device, dtype)
    codes = ours.encode(x)
    work: dict[str, Work] = {
        "encode, calumma": lambda: ours.encode(x),
        "encode, transformers": lambda: theirs.encode(x),  # type: ignore[operator]
        "decode, calumma": lambda: ours.decode(codes),
        **ceilings(given.resolution, device, dtype),
    }
    same = (theirs.encode(x).image_tokens.view_as(codes) == codes).float().mean().item()  # type: ignore[operator]
    took = seconds(work, device, given.repeats)
    rate = {name: flops(run) / took[name] / 1e9 for name, run in work.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {given.dtype}, "
        f"batch {given.batch}, {given.resolution}x{given.resolution}; equal codes: {same:.2%}\n"
    )
    print("| | seconds | images/s | GFLOP/s | of matmul | of convolution |\n|---|---|---|---|---|---|")
    for name, time_taken in took.items():
        images = "" if "ceiling" in name else f"{given.batch / time_taken:.3f}"
        shares = [f"{rate[name] / rate[limit]:.0%}" for limit in ("matmul ceiling", "convolution ceiling")]
        print(f"| {name} | {time_taken:.3f} | {images} | {rate[name]:.0f} | {shares[0]} | {shares[1]} |")
    ratio = took["encode, transformers"] / took["encode, calumma"]
    print(f"\nencode, calumma over transformers: {ratio:.2f} times the images a second (target: 1.0 or more)")


if __name__ == "__main__":
    main()
