"""ULSAM: a light map of attention per group of channels.

Paper: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks", Saini, Jha, Das,
Mittal, Mohan, WACV 2020 - https://arxiv.org/abs/2006.15102
Code: https://github.com/Nandan91/ULSAM, no licence file in what was read; written here from the formulas.

Differences from the authors' code: its arguments nout, h and w, which do nothing, are gone, and importing this does not
make CUDA tensors the default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.errors import check_tensor

__all__ = ["ULSAM"]


class SubspaceAttention(nn.Module):
    """x + x * softmax over positions of a one-channel map that is made of x [B, C, H, W]."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **dd)
        self.bn_dws = nn.BatchNorm2d(channels, **dd)
        self.conv_point = nn.Conv2d(channels, 1, 1, **dd)
        self.bn_point = nn.BatchNorm2d(1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn_dws(self.conv_dws(x)).relu()
        out = F.max_pool2d(out, 3, stride=1, padding=1)
        out = self.bn_point(self.conv_point(out)).relu()
        weight = out.flatten(2).softmax(-1).view_as(out)
        return x + x * weight


class ULSAM(nn.Module):
    """Channels in `num_splits` groups, each with its own map of attention.

    Per group: depthwise 1x1 convolution, norm, ReLU, 3x3 max pooling, 1x1 convolution to one channel, norm, ReLU,
    softmax over all positions; the group is multiplied by it and added.

    Args:
        channels: of the map.
        num_splits: groups; must divide channels.

    [B, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int, num_splits: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if num_splits < 1 or channels % num_splits:
            raise ValueError(f"num_splits must divide channels={channels}, got {num_splits!r}")
        self.num_splits = num_splits
        self.subspaces = nn.ModuleList(
            SubspaceAttention(channels // num_splits, device, dtype) for _ in range(num_splits)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_tensor("x", x, ndim=4)
        parts = x.chunk(self.num_splits, 1)
        return torch.cat([attend(part) for attend, part in zip(self.subspaces, parts)], 1)
