"""ViTAEv2's cells with varied-size window attention.

Paper: "VSA: Learning Varied-Size Window Attention in Vision Transformers", Zhang et al., ECCV 2022, arXiv:2204.08446;
the cells are those of "ViTAEv2", Zhang et al., IJCV 2023, arXiv:2202.10108. Parameter names are those of the authors'
published checkpoints (`PRM`, `PCM`, `pos`). Reduction cells' norms have eps 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import Mlp
from attnzoo.backbones.blocks.vsa import VSA, channels_first
from attnzoo.errors import check_choice


def _parallel(
    in_dim: int, dims: Sequence[int], out_dim: int, strides: Sequence[int], groups: int, dd: dict
) -> nn.Sequential:
    """The parallel convolutional module: three 3 x 3 convolutions, norm and SiLU after the first two."""
    layers: list[nn.Module] = []
    for given, made, stride in zip((in_dim, *dims), (*dims, out_dim), strides):
        if layers:
            layers += [nn.BatchNorm2d(given, **dd), nn.SiLU()]
        if given % groups or made % groups:
            raise ValueError(f"groups must divide the channels of every convolution, got {groups} for {given}, {made}")
        layers.append(nn.Conv2d(given, made, 3, stride, 1, groups=groups, **dd))
    return nn.Sequential(*layers)


class PyramidReduction(nn.Module):
    """Strided convolutions at several dilations, each followed by GELU, concatenated dilation by dilation or summed."""

    def __init__(
        self, in_dim: int, dim: int, kernel_size: int, stride: int, dilations: Sequence[int], op: str, dd: dict
    ) -> None:
        super().__init__()
        self.op = op
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
            if padding < 0:
                raise ValueError(f"kernel_size must be at least strides - 1 = {stride - 1}, got {kernel_size}")
            layer = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, dilation, **dd)
            self.convs.append(nn.Sequential(layer, nn.GELU()))

    def forward(self, x: Tensor) -> Tensor:
        maps = [layer(x) for layer in self.convs]
        return torch.cat(maps, dim=1) if self.op == "cat" else sum(maps[1:], maps[0])


class ReductionCell(nn.Module):
    """From one stage to the next: attention of what the pyramid reduction made, plus parallel convolutions, and an MLP.

    [B, in_dim, H, W] -> [B, ceil(H / stride), ceil(W / stride), dim]. There is no residual around the attention.
    """

    def __init__(
        self,
        in_dim: int,
        stem_dim: int,
        dim: int,
        num_heads: int,
        *,
        stride: int,
        kernel_size: int,
        dilations: Sequence[int],
        op: str,
        groups: int,
        wide_pcm: bool,
        window_size: int,
        cpe: bool,
        pad: str,
        compat: str,
        dd: dict,
    ) -> None:
        super().__init__()
        check_choice("strides", stride, (2, 4, 8))
        check_choice("reduction_op", op, ("cat", "sum"))
        self.stride = stride
        halvings = stride.bit_length() - 1
        width = 2 * dim if wide_pcm else stem_dim
        self.PCM = _parallel(in_dim, (width, width), dim, [2 if i < halvings else 1 for i in range(3)], groups, dd)
        self.PRM = PyramidReduction(in_dim, stem_dim, kernel_size, stride, dilations, op, dd)
        seen = stem_dim * (len(dilations) if op == "cat" else 1)
        self.norm1 = nn.LayerNorm(seen, **dd)
        self.pos = nn.Conv2d(seen, seen, 7, 1, 3, groups=seen, **dd) if cpe else None
        self.attn = VSA(seen, num_heads, window_size, out_dim=dim, pad=pad, compat=compat, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        below, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        tokens = self.PRM(x)
        if self.pos is not None:
            tokens = tokens + self.pos(tokens)
        tokens = self.attn(self.norm1(tokens.permute(0, 2, 3, 1))) + self.PCM(x).permute(0, 2, 3, 1)
        return tokens + self.mlp(self.norm2(tokens))


class NormalCell(nn.Module):
    """x + attn(norm1(x + pos(x))) + PCM(x), then + mlp(norm2(.)), on [B, H, W, dim].

    The position embedding stays out of the residual stream.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        groups: int,
        window_size: int,
        cpe: bool,
        qkv_bias: bool,
        scale: float | None,
        proj_drop: float,
        drop_path: float,
        norm_layer: Callable[..., nn.Module],
        pad: str,
        compat: str,
        dd: dict,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim, **dd)
        self.pos = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim, **dd) if cpe else None
        self.attn = VSA(
            dim,
            num_heads,
            window_size,
            qkv_bias=qkv_bias,
            scale=scale,
            proj_drop=proj_drop,
            pad=pad,
            compat=compat,
            **dd,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, hidden, proj_drop, **dd)
        self.PCM = _parallel(dim, (hidden, dim), dim, (1, 1, 1), groups, dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x if self.pos is None else x + channels_first(self.pos, x)
        x = x + self.drop_path(self.attn(self.norm1(tokens))) + self.drop_path(channels_first(self.PCM, x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VSAStage(nn.Module):
    """A reduction cell and normal cells, by the published names."""

    def __init__(self, reduction: nn.Module, cells: Sequence[nn.Module]) -> None:
        super().__init__()
        self.RC = reduction
        self.NC = nn.Sequential(*cells)
