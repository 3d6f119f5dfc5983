"""The Inception network of FID: TensorFlow's of 2015-12-05, whose weights are published for PyTorch.

Layers have the names of torch-fidelity's and pytorch-fid's files (weights-inception-2015-12-05-6726825d.pth,
pt_inception-2015-12-05-6726825d.pth), after Szegedy et al., arXiv 1512.00567; it differs from torchvision's network in
its pools. Pictures are resized as TensorFlow 1 did. B: batch, C: channels, H, W: height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SIDE = 299  # pixels
CLASSES = 1008
Size = int | tuple[int, int]


class Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)), inplace=True)


# A branch is a chain of convolutions: name -> (outputs, size, stride, padding).
Layers = dict[str, tuple[int, Size, int, Size]]
WIDE, HIGH = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
ROW, COLUMN = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
ONE, THREE, HALVING = (1, 1, 0), (3, 1, 1), (3, 2, 0)


class Block(nn.Module):
    """Branches beside each other, joined by channels; the last is a pool, before a convolution where it has one.

    pool: "mean" leaves padding out of the mean, "max" keeps the size, "half" halves it. A branch's entries that are
    named `…a` and `…b` stand beside each other instead of one after the other."""

    def __init__(self, inputs: int, branches: list[Layers], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self._branches, self._pool = [list(branch) for branch in branches], pool
        for branch in branches:
            width = inputs
            for name, (outputs, size, stride, padding) in branch.items():
                self.add_module(name, Convolution(width, outputs, size, stride, padding))
                width = width if name.endswith("a") else outputs
        if pooled:
            self.branch_pool = Convolution(inputs, pooled, *ONE)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        found = []
        for branch in self._branches:
            y_BCHW = x_BCHW
            for name in branch:
                if name.endswith("a"):
                    continue
                layer = self.get_submodule(name)
                if name.endswith("b"):
                    beside = self.get_submodule(f"{name[:-1]}a")
                    y_BCHW = torch.cat([beside(y_BCHW), layer(y_BCHW)], 1)
                else:
                    y_BCHW = layer(y_BCHW)
            found.append(y_BCHW)
        if self._pool == "mean":
            pooled_BCHW = F.avg_pool2d(x_BCHW, 3, 1, 1, count_include_pad=False)
        else:
            pooled_BCHW = F.max_pool2d(x_BCHW, 3, *((2, 0) if self._pool == "half" else (1, 1)))
        found.append(self.branch_pool(pooled_BCHW) if hasattr(self, "branch_pool") else pooled_BCHW)
        return torch.cat(found, 1)


def _a(inputs: int, pooled: int) -> Block:
    triple: Layers = {"branch3x3dbl_1": (64, *ONE), "branch3x3dbl_2": (96, *THREE), "branch3x3dbl_3": (96, *THREE)}
    five: Layers = {"branch5x5_1": (48, *ONE), "branch5x5_2": (64, 5, 1, 2)}
    return Block(inputs, [{"branch1x1": (64, *ONE)}, five, triple], "mean", pooled)


def _b(inputs: int) -> Block:
    triple: Layers = {"branch3x3dbl_1": (64, *ONE), "branch3x3dbl_2": (96, *THREE), "branch3x3dbl_3": (96, *HALVING)}
    return Block(inputs, [{"branch3x3": (384, *HALVING)}, triple], "half")


def _c(inner: int) -> Block:
    seven: Layers = {"branch7x7_1": (inner, *ONE), "branch7x7_2": (inner, *ROW), "branch7x7_3": (192, *COLUMN)}
    twice: Layers = {
        "branch7x7dbl_1": (inner, *ONE), "branch7x7dbl_2": (inner, *COLUMN), "branch7x7dbl_3": (inner, *ROW),
        "branch7x7dbl_4": (inner, *COLUMN), "branch7x7dbl_5": (192, *ROW),
    }  # fmt: skip
    return Block(768, [{"branch1x1": (192, *ONE)}, seven, twice], "mean", 192)


def _d() -> Block:
    three: Layers = {"branch3x3_1": (192, *ONE), "branch3x3_2": (320, *HALVING)}
    seven: Layers = {
        "branch7x7x3_1": (192, *ONE), "branch7x7x3_2": (192, *ROW), "branch7x7x3_3": (192, *COLUMN),
        "branch7x7x3_4": (192, *HALVING),
    }  # fmt: skip
    return Block(768, [three, seven], "half")


def _e(inputs: int, pool: str) -> Block:
    three: Layers = {"branch3x3_1": (384, *ONE), "branch3x3_2a": (384, *WIDE), "branch3x3_2b": (384, *HIGH)}
    twice: Layers = {
        "branch3x3dbl_1": (448, *ONE), "branch3x3dbl_2": (384, *THREE),
        "branch3x3dbl_3a": (384, *WIDE), "branch3x3dbl_3b": (384, *HIGH),
    }  # fmt: skip
    return Block(inputs, [{"branch1x1": (320, *ONE)}, three, twice], pool, 192)


class Inception(nn.Module):
    """uint8 [B, 3, H, W] -> features float32 [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, *HALVING)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, *THREE)
        self.Conv2d_3b_1x1 = Convolution(64, 80, *ONE)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a = _d()
        self.Mixed_7b, self.Mixed_7c = _e(1280, "mean"), _e(2048, "max")
        self.fc = nn.Linear(2048, CLASSES)  # of the files; features stand before it

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        x_BCHW = (resized(images_B3HW.float()) - 128) / 128
        x_BCHW = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCHW)))
        x_BCHW = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x_BCHW, 3, 2)))
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x_BCHW = self.get_submodule(f"Mixed_{name}")(x_BCHW)
        return x_BCHW.mean((2, 3))


def resized(images_B3HW: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Bilinear, without half a pixel's shift: TensorFlow 1's resize_bilinear."""
    x_B3HW = images_B3HW
    for axis in (2, 3):
        length = x_B3HW.shape[axis]
        places = torch.arange(side, dtype=torch.float32) * (length / side)
        before = places.floor().long()
        after = (before + 1).clamp(max=length - 1)
        part = (places - before).view([-1 if n == axis else 1 for n in range(4)])
        x_B3HW = x_B3HW.index_select(axis, before) * (1 - part) + x_B3HW.index_select(axis, after) * part
    return x_B3HW
