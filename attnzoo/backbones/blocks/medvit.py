"""The blocks of MedViTV2: local (neighborhood attention and a convolution) and global (attention, convolution, KAN).

Definitions, quirks and names: see attnzoo/backbones/medvitv2.py. Maps are [B, C, H, W].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, make_divisible
from torch import Tensor, nn

from attnzoo.backbones.blocks.fasterkan import FasterKAN
from attnzoo.backbones.blocks.neighborhood import NeighborhoodAttention2D, refuse_attn_drop
from attnzoo.errors import check_choice, check_range

COMPAT = ("default", "official")


def to_tokens(x: Tensor, compat: str) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C]; "official" keeps the memory as it is and only says another shape."""
    if compat == "official":
        batch, channels, height, width = x.shape
        return x.reshape(batch, height, width, channels)
    return x.permute(0, 2, 3, 1)


def to_map(x: Tensor, compat: str) -> Tensor:
    """The way back from `to_tokens`: [B, H, W, C] -> [B, C, H, W]."""
    if compat == "official":
        batch, height, width, channels = x.shape
        return x.reshape(batch, channels, height, width)
    return x.permute(0, 3, 1, 2)


class ConvNormReLU(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_chans, **dd)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Embed(nn.Module):
    """To out_chans by a 1x1 convolution and a batch norm, behind 2x2 average pooling (rounded up) for stride 2.

    Nothing at all where neither is needed.
    """

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("stride", stride, (1, 2))
        self.avgpool: nn.Module = nn.Identity()
        self.conv: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if stride == 2:
            self.avgpool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
        if stride == 2 or in_chans != out_chans:
            self.conv = nn.Conv2d(in_chans, out_chans, 1, bias=False, **dd)
            self.norm = nn.BatchNorm2d(out_chans, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.avgpool(x)))


class ChannelGate(nn.Module):
    """Squeeze and excitation: x times hard sigmoid of a two-layer MLP on its mean; `reduced` hidden channels."""

    def __init__(self, channels: int, reduced: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            nn.Linear(channels, reduced, **dd), nn.ReLU(), nn.Linear(reduced, channels, **dd), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class LocalFeedForward(nn.Module):
    """x + conv(x): 1x1 up, depthwise, `ChannelGate` with expand_ratio hidden channels, 1x1 down, with batch norms."""

    def __init__(
        self, dim: int, kernel_size: int = 3, expand_ratio: float = 3, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(dim * expand_ratio)
        if hidden < dim:
            raise ValueError(f"expand_ratio must be at least 1, got {expand_ratio!r}")
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel_size, 1, kernel_size // 2, groups=hidden, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            nn.Hardswish(),
            ChannelGate(hidden, hidden // dim, **dd),
            nn.Conv2d(hidden, dim, 1, bias=False, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LocalBlock(nn.Module):
    """Local feature perception: x = embed(x); x = x + attn(norm1(x)); n = norm2(x); x = x + n + conv(n).

    Args:
        in_channels, out_channels, stride: of the embedding.
        kernel_size: of the depthwise convolution.
        head_dim: channels of an attention head.
        mlp_ratio: expansion of the convolutions.
        path_dropout: stochastic depth of the attention branch.
        window, dilation: of the attention; the published models have 7 and 1.
        pad_small: see NeighborhoodAttention2D.
        compat: see medvitv2.py.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        path_dropout: float = 0.0,
        head_dim: int = 32,
        mlp_ratio: float = 3,
        *,
        window: int = 7,
        dilation: int = 1,
        pad_small: bool = False,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("compat", compat, COMPAT)
        if out_channels % head_dim:
            raise ValueError(f"head_dim must divide out_channels={out_channels}, got {head_dim}")
        self.compat = compat
        self.patch_embed = Embed(in_channels, out_channels, stride, **dd)
        self.norm1 = nn.BatchNorm2d(out_channels, **dd)
        self.attn = NeighborhoodAttention2D(
            out_channels, out_channels // head_dim, window, dilation, pad_small=pad_small, **dd
        )
        self.attention_path_dropout = DropPath(path_dropout) if path_dropout > 0 else nn.Identity()
        self.conv = LocalFeedForward(out_channels, kernel_size, mlp_ratio, **dd)
        self.norm2 = nn.BatchNorm2d(out_channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        mixed = to_map(self.attn(to_tokens(self.norm1(x), self.compat)), self.compat)
        x = x + self.attention_path_dropout(mixed)
        return x + self.conv(self.norm2(x))


class PooledSelfAttention(nn.Module):
    """Softmax attention of tokens [B, N, dim]; keys and values from means of sr_ratio^2 consecutive tokens.

    Tokens that do not fill a last group are keys of nobody.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        sr_ratio: int = 1,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % head_dim:
            raise ValueError(f"head_dim must divide the attention's channels ({dim}), got {head_dim}")
        self.num_heads = dim // head_dim
        self.group = sr_ratio**2
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.norm = nn.BatchNorm1d(dim, **dd) if sr_ratio > 1 else None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        source = x
        if self.norm is not None:
            source = self.norm(F.avg_pool1d(x.transpose(1, 2), self.group)).transpose(1, 2)
        q, k, v = self._heads(self.q(x)), self._heads(self.k(source)), self._heads(self.v(source))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class HeadConv(nn.Module):
    """3x3 convolution in groups of head_dim channels, batch norm, ReLU, 1x1 convolution."""

    def __init__(self, dim: int, head_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.group_conv3x3 = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim // head_dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.act = nn.ReLU()
        self.projection = nn.Conv2d(dim, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.act(self.norm(self.group_conv3x3(x))))


def split_channels(out_channels: int, head_dim: int, mix_block_ratio: float) -> tuple[int, int]:
    """(attention's, convolution's) channels of a global block; ValueError where the convolution would get none."""
    attention = make_divisible(int(out_channels * mix_block_ratio), 32)
    convolution = out_channels - attention
    if convolution < head_dim or convolution % (convolution // head_dim):
        raise ValueError(
            f"out_channels={out_channels} at mix_block_ratio={mix_block_ratio} gives the attention {attention} "
            f"channels (a multiple of 32) and leaves {convolution} for the convolution, which needs at least one head "
            f"of head_dim={head_dim} and whole groups"
        )
    return attention, convolution


class GlobalBlock(nn.Module):
    """Global feature perception: attention on a part of the channels, convolution makes the others, a KAN on all.

    x = embed(x); x = x + attn(norm1(x)); y = projection(x); y = y + mhca(y); x = [x | y]; x = x + kan(norm2(x))

    Args:
        in_channels, out_channels, stride: of the block.
        path_dropout: stochastic depth; attention and convolution share it by mix_block_ratio.
        sr_ratio: keys and values are means of sr_ratio^2 tokens.
        mlp_ratio: hidden width of the KAN over out_channels.
        head_dim: channels of a head (and of a group of the convolution).
        mix_block_ratio: the attention's share of the channels, rounded to a multiple of 32.
        proj_drop, attn_drop: dropout after the attention; attn_drop must be 0.
        compat: see medvitv2.py.

    `conv` is saved in the authors' checkpoints and not used.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        path_dropout: float = 0.0,
        stride: int = 1,
        sr_ratio: int = 1,
        mlp_ratio: float = 2,
        head_dim: int = 32,
        mix_block_ratio: float = 0.75,
        *,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        compat: str = "default",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_choice("compat", compat, COMPAT)
        check_range("sr_ratio", sr_ratio, low=1)
        refuse_attn_drop(attn_drop)
        self.compat = compat
        attention, convolution = split_channels(out_channels, head_dim, mix_block_ratio)
        self.patch_embed = Embed(in_channels, attention, stride, **dd)
        self.norm1 = nn.BatchNorm2d(attention, **dd)
        self.e_mhsa = PooledSelfAttention(attention, head_dim, sr_ratio, proj_drop, **dd)
        self.mhsa_path_dropout = self._drop_path(path_dropout * mix_block_ratio)
        self.projection = Embed(attention, convolution, **dd)
        self.mhca = HeadConv(convolution, head_dim, **dd)
        self.mhca_path_dropout = self._drop_path(path_dropout * (1 - mix_block_ratio))
        self.norm2 = nn.BatchNorm2d(out_channels, **dd)
        self.conv = LocalFeedForward(out_channels, expand_ratio=mlp_ratio, **dd)
        self.mlp_path_dropout = self._drop_path(path_dropout)
        self.kan = FasterKAN([out_channels, int(out_channels * mlp_ratio), out_channels], **dd)

    @staticmethod
    def _drop_path(rate: float) -> nn.Module:
        return DropPath(rate) if rate > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        size = x.shape[2:]
        tokens = self.norm1(x).flatten(2).transpose(1, 2)
        mixed = self.mhsa_path_dropout(self.e_mhsa(tokens))
        x = x + mixed.transpose(1, 2).unflatten(2, size)
        local = self.projection(x)
        local = local + self.mhca_path_dropout(self.mhca(local))
        x = torch.cat([x, local], dim=1)
        learned = to_map(self.kan(to_tokens(self.norm2(x), self.compat)), self.compat)
        return x + self.mlp_path_dropout(learned)
