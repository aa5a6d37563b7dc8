"""CARE's token mixer and block: linear attention and two convolutions on groups of channels, beside a memory.

Paper: Zhou et al., "CARE Transformer", CVPR 2025, arXiv:2411.16170. Parameter names are those of the authors'
checkpoints. Maps are channels-first, [B, dim, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import check_range
from attnzoo.kernels import linear_attention

__all__ = ["CAREBlock", "CARETokenMixer"]


class CARETokenMixer(nn.Module):
    """[memory | attention | 3x3 | 7x7] -> (memory as it is, the three groups mixed, each over space only).

    The attention group is linear attention with elu + 1 features, normalised by the sum of its weights; queries and
    keys are one 1x1 convolution of the group, the values are the group itself, and there is no output projection.

    Args:
        in_channels: channels of the map.
        mem_dim: channels of each of the three groups; the memory is the first in_channels - 3 * mem_dim.
        att_head_dim: channels of one attention head (it divides mem_dim), or None for a sum of depthwise 11x1 and 1x11
            convolutions in place of the attention.
    """

    def __init__(
        self,
        in_channels: int,
        mem_dim: int,
        att_head_dim: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_range("mem_dim", mem_dim, 1)
        if 3 * mem_dim > in_channels:
            raise ValueError(f"mem_dim must be at most a third of in_channels={in_channels}, got {mem_dim}")
        self.mem_dim = mem_dim
        self.num_heads = 0
        if att_head_dim is None:
            self.dwconvatt_1 = nn.Conv2d(mem_dim, mem_dim, (11, 1), padding=(5, 0), groups=mem_dim, **dd)
            self.dwconvatt_2 = nn.Conv2d(mem_dim, mem_dim, (1, 11), padding=(0, 5), groups=mem_dim, **dd)
        else:
            if att_head_dim < 1 or mem_dim % att_head_dim:
                raise ValueError(f"att_head_dim must divide mem_dim={mem_dim}, got {att_head_dim}")
            self.num_heads = check_heads(mem_dim, att_head_dim)
            self.qk = nn.Conv2d(mem_dim, 2 * mem_dim, 1, **dd)
        self.dwconv1 = nn.Conv2d(mem_dim, mem_dim, 3, padding=1, groups=mem_dim, **dd)
        self.dwconv2 = nn.Conv2d(mem_dim, mem_dim, 7, padding=3, groups=mem_dim, **dd)

    def _attend(self, x: Tensor) -> Tensor:
        """Linear attention of the map [B, mem_dim, H, W] over all its positions."""

        def heads(t: Tensor) -> Tensor:  # [B, H, W, heads, head_dim]
            return t.permute(0, 2, 3, 1).unflatten(-1, (self.num_heads, -1))

        query, key = self.qk(x).chunk(2, 1)
        out = linear_attention(
            heads(query),
            heads(key),
            heads(x),
            1.0 / (x.shape[2] * x.shape[3]),
            feature_map="elu",
            normaliser="sum",
            eps=1e-6,
        )
        return out.flatten(-2).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in_channels, H, W] -> the memory [B, in_channels - 3 * mem_dim, H, W], [B, 3 * mem_dim, H, W]."""
        width = self.mem_dim
        memory, attended, small, large = x.split([x.shape[1] - 3 * width, width, width, width], 1)
        attended = self._attend(attended) if self.num_heads else self.dwconvatt_1(attended) + self.dwconvatt_2(attended)
        return memory, torch.cat([attended, self.dwconv1(small), self.dwconv2(large)], 1)


class _Interaction(nn.Module):
    """Two convolutional MLPs: over the mixed groups, then over memory and groups together.

    Each is BatchNorm, 1x1, GELU, depthwise 3x3 (no activation after it), 1x1. `last` leaves out the second's 1x1 and
    its residual.
    """

    def __init__(self, dim: int, mem_dim: int, ratios: Sequence[float], last: bool, dd: dict) -> None:
        super().__init__()
        width = 3 * mem_dim
        hidden1, hidden2 = int(width * ratios[0]), int(dim * ratios[1])
        self.inter1_norm = nn.BatchNorm2d(width, **dd)
        self.inter1_fc1 = nn.Conv2d(width, hidden1, 1, **dd)
        self.inter1_conv = nn.Conv2d(hidden1, hidden1, 3, padding=1, groups=hidden1, **dd)
        self.inter1_fc2 = nn.Conv2d(hidden1, width, 1, **dd)
        self.inter2_norm = nn.BatchNorm2d(dim, **dd)
        self.inter2_fc1 = nn.Conv2d(dim, hidden2, 1, **dd)
        self.inter2_conv = nn.Conv2d(hidden2, hidden2, 3, padding=1, groups=hidden2, **dd)
        self.inter2_fc2 = None if last else nn.Conv2d(hidden2, dim, 1, **dd)
        self.out_dim = hidden2 if last else dim

    def forward(self, memory: Tensor, features: Tensor) -> Tensor:
        hidden = F.gelu(self.inter1_fc1(self.inter1_norm(features)))
        features = self.inter1_fc2(self.inter1_conv(hidden)) + features
        x = torch.cat([memory, features], 1)
        hidden = self.inter2_conv(F.gelu(self.inter2_fc1(self.inter2_norm(x))))
        return hidden if self.inter2_fc2 is None else self.inter2_fc2(hidden) + x


class CAREBlock(nn.Module):
    """x + gamma * interaction(token mixer(x)); the last block of a model is the interaction alone, and wider.

    Args:
        dim: channels of the map.
        mem_dim, att_head_dim: see CARETokenMixer.
        ratio: hidden widths of the two MLPs, over 3 * mem_dim and over dim.
        last: no second 1x1 convolution, residual or layer scale; the output has int(dim * ratio[1]) channels.
        ls_init_value: initial layer scale.
        drop_path: applied to the branch, None for nothing.
    """

    def __init__(
        self,
        dim: int,
        mem_dim: int,
        ratio: Sequence[float] = (2, 4),
        *,
        att_head_dim: int | None = None,
        last: bool = False,
        ls_init_value: float = 1e-6,
        drop_path: nn.Module | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(ratio) != 2:
            raise ValueError(f"ratio must hold two numbers, of the first and the second MLP, got {list(ratio)}")
        self.token_mixer = CARETokenMixer(dim, mem_dim, att_head_dim, **dd)
        self.inter_layer = _Interaction(dim, mem_dim, ratio, last, dd)
        self.out_dim = self.inter_layer.out_dim
        self.gamma = None if last else nn.Parameter(torch.full((dim,), float(ls_init_value), **dd))
        self.drop_path = drop_path or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, H, W] -> [B, out_dim, H, W]."""
        branch = self.inter_layer(*self.token_mixer(x))
        if self.gamma is None:
            return branch
        return x + self.drop_path(branch * self.gamma[:, None, None])
