"""Large kernel convolutional attention (LKCA): attention whose weights are learned, one per offset between two places.

Paper: "LKCA: Large Kernel Convolutional Attention", Li, Zeng, Lu, Shi, Chen, Liu, Zhu, 2024 -
https://arxiv.org/abs/2401.05738 (its third version: "Interpreting and Improving Attention From the Perspective of Large
Kernel Convolution")
Code: announced at https://github.com/CatworldLee/LKCA, not at hand; written here from the description, `adapted`.

What follows which statement:

- "It simplifies the attention operation by replacing it with a single large kernel convolution" (abstract): the tokens'
  values are convolved with one learned kernel; no query, no key, no softmax.
- The attention view: (2 sqrt(N) - 1)^2 learned parameters for N tokens on a square map; a window of sqrt(N) x sqrt(N)
  slides over them from the bottom right to the top left, and each of its positions, flattened, is a row of the N x N
  matrix that mixes the values. So a token at offset (dy, dx) has weight kernel[sqrt(N) - 1 + dy, sqrt(N) - 1 + dx],
  which is the convolution with zero padding sqrt(N) - 1. "Equivalent code implementations for each view" (abstract):
  `view` picks one, on the same parameters; the convolution never forms the N x N matrix.

Ours, where we could read no statement: value and output projection as in the ViT's attention that is replaced; one
kernel per head, shared by the head's channels (num_heads=1 is the single kernel, num_heads=dim one per channel); maps
that are not square; other sizes at run time (larger offsets have weight 0, as in a convolution); no place in the
convolution for class or register tokens, which are refused. `LargeKernelConvBlock`'s residual, for CNN stages, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, init_normal, refuse_attn_drop
from attnzoo.errors import UnsupportedError, check_choice, check_tensor, per_axis

__all__ = ["LargeKernelConvAttention", "LargeKernelConvBlock"]


class LargeKernelConvAttention(nn.Module):
    """LKCA on tokens of a map, in place of a ViT's attention.

        layer = as_attn_layer(LargeKernelConvAttention, grid_size=14)
        timm.create_model("vit_tiny_patch16_224", attn_layer=layer, class_token=False, global_pool="avg")

    Args:
        dim, num_heads: channels, and how many kernels; each is shared by dim // num_heads channels.
        qkv_bias: bias of the value projection. proj_bias: of the output projection.
        qk_norm, scale_norm: must be False, attn_drop 0.0: there are no queries, keys or weights of pairs.
        proj_drop: dropout after the output projection.
        grid_size: the map in tokens, one int or (height, width); kernels are 2 * grid_size - 1 on each axis.
        view: "conv", or "attention" for the same with the N x N matrix formed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = None,
        *,
        grid_size: int | tuple[int, int] | None = None,
        view: str = "conv",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        if qk_norm or scale_norm:
            raise UnsupportedError("qk_norm and scale_norm must be False: there are no queries and keys to normalise")
        if grid_size is None:
            raise ValueError("grid_size must be given (as_attn_layer(..., grid_size=14), say): it is the kernel's size")
        check_choice("view", view, ("conv", "attention"))
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.grid_size = per_axis("grid_size", grid_size, 2, low=1)
        self.view = view
        self.value = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kernel = nn.Parameter(torch.empty(num_heads, *(2 * g - 1 for g in self.grid_size), **dd))
        init_normal(self.kernel)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def weights(self, height: int, width: int) -> Tensor:
        """What each token of a height x width map reads from each: [num_heads, N, N], row-major tokens."""
        kernel: Tensor = self.kernel
        offsets = []
        for axis, (size, grid) in enumerate(zip((height, width), self.grid_size), 1):
            at = torch.arange(size, device=kernel.device)
            offset = at[None, :] - at[:, None] + grid - 1  # [reader, read]
            if size > grid:  # offsets that the kernel doesn't reach
                padding = (0, 0) * (2 - axis) + (size - grid,) * 2
                kernel, offset = F.pad(kernel, padding), offset + size - grid
            offsets.append(offset)
        rows, columns = offsets[0][:, None, :, None], offsets[1][None, :, None, :]
        return kernel[:, rows, columns].flatten(3, 4).flatten(1, 2)

    def mix(self, value: Tensor) -> Tensor:
        """Values [B, H, W, dim] -> what every place reads, the same shape."""
        batch, height, width, dim = value.shape
        if self.view == "attention":
            tokens = value.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            mixed = self.weights(height, width).to(value.dtype) @ tokens
            return mixed.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        # A head's channels share a kernel: they are further images of the batch, heads are the convolution's groups.
        maps = value.unflatten(-1, (self.num_heads, -1)).permute(0, 4, 3, 1, 2).flatten(0, 1)
        pad = tuple(g - 1 for g in self.grid_size)
        mixed = F.conv2d(maps, self.kernel[:, None].to(maps.dtype), padding=pad, groups=self.num_heads)
        return mixed.unflatten(0, (batch, -1)).permute(0, 3, 4, 2, 1).flatten(-2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, dim] of a map of grid_size, or of a square one, or the map [B, H, W, dim] -> the same shape."""
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask and is_causal are not supported: weights are of offsets, not of pairs")
        grid = None
        if x.ndim == 3:
            grid = self._grid(x.shape[1])
            x = x.unflatten(1, grid)
        check_tensor("x", x, ndim=4)
        out = self.proj_drop(self.proj(self.mix(self.value(x))))
        return out if grid is None else out.flatten(1, 2)

    def _grid(self, count: int) -> tuple[int, int]:
        if count == self.grid_size[0] * self.grid_size[1]:
            return self.grid_size[0], self.grid_size[1]
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"x must hold the tokens of a {self.grid_size[0]} x {self.grid_size[1]} map (grid_size) or of a square "
                f"one, got {count}: build the ViT with class_token=False and without register tokens"
            )
        return side, side

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}, view={self.view!r}"


class LargeKernelConvBlock(nn.Module):
    """x + LKCA(x) on maps [B, channels, H, W], for CNN stages: `insert(model, "lkca")`.

    Args:
        channels: of the map.
        grid_size: the largest offset is grid_size - 1 per axis; kernels are 2 * grid_size - 1.
        num_heads: kernels; None for one per channel.
        view: see LargeKernelConvAttention.
    """

    def __init__(
        self,
        channels: int,
        grid_size: int | tuple[int, int] = 7,
        num_heads: int | None = None,
        view: str = "conv",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        heads = channels if num_heads is None else num_heads
        self.attn = LargeKernelConvAttention(
            channels, heads, grid_size=grid_size, view=view, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        check_tensor("x", x, ndim=4)
        return x + self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
