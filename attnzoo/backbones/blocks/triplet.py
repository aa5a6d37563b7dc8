"""Triplet attention: three gates, each over another pair of a map's axes.

Paper: "Rotate to Attend: Convolutional Triplet Attention Module", Misra, Nalamada, Arasanipalai, Hou, WACV 2021 -
https://arxiv.org/abs/2010.03045
Code: https://github.com/LandskapeAI/triplet-attention, MIT licence; written here from the formulas. Parameter names are
those of the repository's root module (`cw`, `hc`, `hw`); the published networks use others, which
`attnzoo.backbones.resnet_triplet` translates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import check_tensor

__all__ = ["TripletAttention"]


class _ConvNorm(nn.Module):
    """A bias-free convolution of 2 maps to 1, and its norm."""

    def __init__(self, kernel_size: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class AttentionGate(nn.Module):
    """x * sigmoid(norm(conv([max, mean] of x over axis 1))), x of [B, any, any, any]."""

    def __init__(self, kernel_size: int = 7, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = _ConvNorm(kernel_size, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.amax(1), x.mean(1)], 1)
        return x * self.conv(pooled).sigmoid()


class TripletAttention(nn.Module):
    """The mean of three gated copies of a map: gates over (channel, width), (height, channel) and (height, width).

    Args:
        channels: not needed, any number of channels is served; here because timm's slots give it.
        no_spatial: leave the (height, width) gate out.
        kernel_size: odd side of the gates' convolutions.

    [B, C, H, W] -> the same shape, any C, H and W.
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        no_spatial: bool = False,
        kernel_size: int = 7,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size!r}")
        self.cw = AttentionGate(kernel_size, device, dtype)
        self.hc = AttentionGate(kernel_size, device, dtype)
        self.hw = None if no_spatial else AttentionGate(kernel_size, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_tensor("x", x, ndim=4)
        out = self.cw(x.transpose(1, 2)).transpose(1, 2) + self.hc(x.transpose(1, 3)).transpose(1, 3)
        return out / 2 if self.hw is None else (out + self.hw(x)) / 3
