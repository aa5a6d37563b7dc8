"""Polarized self-attention: one branch that weighs channels, one that weighs positions.

Paper: "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", Liu, Liu, Fan, Huang, 2021 -
https://arxiv.org/abs/2107.00782
Code: https://github.com/DeLightCMU/PSA (semantic-segmentation/network/PSA.py), no licence file in what was read;
written here from the formulas. Parameter names are the authors'.

Where the authors' code departs from the paper's formulas, `compat="official"` follows the code, the default the paper:

- weights of positions (paper, section 3, spatial-only branch): sigmoid(softmax over channels of the pooled query, times
  the values). The code of the parallel layout takes the softmax over positions AFTER that product, so that all weights
  lie between 0.5 and 0.73 and nearly all at 0.5; the sequential layout takes it over positions of the values.
- names: the code calls the branch that weighs channels `spatial_pool` and the other `channel_pool`.
- the code's arguments kernel_size (ignored), stride (must be 1) and planes (must be inplanes) are gone.

The channel branch of the parallel layout has one bias-free convolution after the pooling, in the code and here; the
sequential layout has the bottleneck with LayerNorm (C/2 -> C/8 -> C).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnzoo.errors import check_choice, check_tensor

__all__ = ["PolarizedParallel", "PolarizedSequential"]


class _Polarized(nn.Module):
    """The two branches; `conv_up` and the order are the subclasses'."""

    def __init__(self, channels: int, compat: str | None, divisor: int, dd: dict[str, Any]) -> None:
        super().__init__()
        check_choice("compat", compat, (None, "official"))
        if channels < divisor or channels % 2:
            raise ValueError(f"channels must be even and at least {divisor}, got {channels}")
        self.compat = compat
        inner = channels // 2
        self.conv_q_right = nn.Conv2d(channels, 1, 1, bias=False, **dd)
        self.conv_v_right = nn.Conv2d(channels, inner, 1, bias=False, **dd)
        self.conv_up = self._up(channels, inner, dd)
        self.conv_q_left = nn.Conv2d(channels, inner, 1, bias=False, **dd)
        self.conv_v_left = nn.Conv2d(channels, inner, 1, bias=False, **dd)

    def _up(self, channels: int, inner: int, dd: dict[str, Any]) -> nn.Module:
        return nn.Conv2d(inner, channels, 1, bias=False, **dd)

    def weigh_channels(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] times one weight per channel, sigmoid(up(values summed by a softmax over positions))."""
        where = self.conv_q_right(x).flatten(2).softmax(-1)
        pooled = self.conv_v_right(x).flatten(2) @ where.transpose(1, 2)
        return x * self.conv_up(pooled[..., None]).sigmoid()

    def weigh_positions(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] times one weight per position; see the module's text for the two readings."""
        query = self.conv_q_left(x).mean((2, 3))[:, None]
        value = self.conv_v_left(x).flatten(2)
        weight = self._weights(query, value).sigmoid()
        return x * weight.unflatten(-1, x.shape[2:])

    def _weights(self, query: Tensor, value: Tensor) -> Tensor:
        """query [B, 1, C/2], value [B, C/2, H * W] -> logits of the weights, [B, 1, H * W]."""
        return query.softmax(-1) @ value


class PolarizedParallel(_Polarized):
    """The sum of both branches, each on the input.

    Args:
        channels: of the map, even.
        compat: None for the paper's formula, "official" for the authors' code (see the module's text).

    [B, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int, *, compat: str | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, compat, 2, {"device": device, "dtype": dtype})

    def _weights(self, query: Tensor, value: Tensor) -> Tensor:
        return (query @ value).softmax(-1) if self.compat else super()._weights(query, value)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_tensor("x", x, ndim=4)
        return self.weigh_channels(x) + self.weigh_positions(x)


class PolarizedSequential(_Polarized):
    """First the weights of channels, then, of that, the weights of positions.

    Args:
        channels: of the map, even and at least 8.
        compat: None for the paper's formula, "official" for the authors' code (see the module's text).

    [B, C, H, W] -> the same shape.
    """

    def __init__(self, channels: int, *, compat: str | None = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__(channels, compat, 8, {"device": device, "dtype": dtype})

    def _up(self, channels: int, inner: int, dd: dict[str, Any]) -> nn.Module:
        narrow = inner // 4
        return nn.Sequential(
            nn.Conv2d(inner, narrow, 1, **dd),
            nn.LayerNorm([narrow, 1, 1], **dd),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, channels, 1, **dd),
        )

    def _weights(self, query: Tensor, value: Tensor) -> Tensor:
        return query @ value.softmax(-1) if self.compat else super()._weights(query, value)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_tensor("x", x, ndim=4)
        return self.weigh_positions(self.weigh_channels(x))
