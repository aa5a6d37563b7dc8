"""MSA-Conv: a convolution whose kernel is attention over its window.

Paper: "TiC: Exploring Vision Transformer in Convolution", Zhang et al., 2023 - https://arxiv.org/abs/2310.04134
Code: https://github.com/zs670980918/MSA-Conv, no licence file; written here from the formulas. It holds this module and
its operator only: no network, no checkpoint. Parameter names are the authors'.

Differences from the authors' code:

- Kernels with dilation * (kernel_size - 1) odd on an axis have no centre; the authors' operator then returns scrambled
  maps without a word. Here they are a ValueError.
- float64, bfloat16 and the backward pass on a CPU work.
- The dropout of attention weights while training (0.1) is left out: a fused kernel never forms them.
- The ReLU at the end, which the authors write as a statement without a value (it acts all the same, in place), is
  written as what it does.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import check_tensor, per_axis
from attnzoo.kernels import neighborhood_attention

__all__ = ["MSAConv2d", "window_attention"]


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    num_heads: int = 1,
) -> Tensor:
    """MSA-Conv's operator: softmax over the window of each position; zeros outside the map take softmax mass.

    query, key, value: [B, C, H, W]. Key i of an axis' window stands at position + i * dilation - dilation *
    (kernel_size - 1) / 2. scale: None for (C / num_heads) ** -0.5. Returns [B, C, H, W].

    Raises ValueError for kernels without a centre: dilation * (kernel_size - 1) odd.
    """
    check_tensor("query", query, ndim=4)
    kernel, step = per_axis("kernel_size", kernel_size, 2, low=1), per_axis("dilation", dilation, 2, low=1)
    _check_window(kernel, step)
    head_dim = check_heads(query.shape[1], num_heads)
    # An even kernel's keys stand half a step off the multiples of its dilation: the keys are moved by that half.
    half = [0 if k % 2 else d // 2 for k, d in zip(kernel, step)]
    height, width = query.shape[2:]
    before, after = (half[1], 0, half[0], 0), (0, half[1], 0, half[0])
    if any(half):
        query, key, value = F.pad(query, before), F.pad(key, after), F.pad(value, after)
    query, key, value = (t.permute(0, 2, 3, 1).unflatten(-1, (num_heads, -1)) for t in (query, key, value))
    out = neighborhood_attention(
        query, key, value, kernel, dilation=step, scale=head_dim**-0.5 if scale is None else scale, border="zero"
    )
    return out[:, half[0] : half[0] + height, half[1] : half[1] + width].flatten(-2).permute(0, 3, 1, 2)


def _check_window(kernel: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    if any(d * (k - 1) % 2 for k, d in zip(kernel, dilation)):
        raise ValueError(
            f"kernel_size must be odd, or even with an even dilation, got kernel_size={kernel}, dilation={dilation}: "
            "such a window has no centre (the authors' operator returns scrambled maps for it)"
        )


class MSAConv2d(nn.Module):
    """Attention over each position's window, a residual, a convolution and a ReLU.

    Args:
        channels: of the input.
        out_channels: of the output; None for channels.
        kernel_size: of the window and of the convolution after it, one int or (height, width).
        stride, padding, bias: of the convolution; padding None keeps the size at stride 1 (the authors' is 1, which
            fits a kernel of 3).
        dilation: of the window alone.
        num_heads: the authors' is 1, so that logits run over all channels.

    [B, channels, H, W] -> [B, out_channels, H', W'].
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        bias: bool = False,
        num_heads: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, low=1)
        self.dilation = per_axis("dilation", dilation, 2, low=1)
        _check_window(self.kernel_size, self.dilation)
        check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.qkv_conv = nn.Conv2d(channels, 3 * channels, 1, **dd)
        if padding is None:
            padding = tuple(k // 2 for k in self.kernel_size)
        self.mlp = nn.Conv2d(channels, out_channels or channels, self.kernel_size, stride, padding, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out_channels, H', W']."""
        check_tensor("x", x, ndim=4)
        query, key, value = self.qkv_conv(x).chunk(3, 1)
        out = window_attention(query, key, value, self.kernel_size, self.dilation, num_heads=self.num_heads)
        return self.mlp(x + out).relu()
