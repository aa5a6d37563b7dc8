"""The blocks of HAT, on maps [B, H, W, dim]. Parameter names are those of the authors' checkpoints.

Paper: "Activating More Pixels in Image Super-Resolution Transformer", Chen et al., CVPR 2023, arXiv:2205.04437.

HAB (hybrid attention block), s = conv_scale, windows of odd blocks moved by half a window:

    n = LN(x);  x = x + WindowAttention(n) + s CAB(n);  x = x + MLP(LN(x))
    CAB(n) = c * sigmoid(W2 relu(W1 mean(c))),  c = Conv3x3(GELU(Conv3x3(n))),  mean over the whole map

OCAB (overlapping cross-attention block): queries of a window, keys and values of the larger window around it. Outside
the image keys and values are zeros that take part in the softmax (their logit is the bias alone).

The windows of a moved map are alike but for the last row and column, which hold tokens from both ends of the image: one
call of scaled_dot_product_attention each for the inner windows, the last row, the last column and the corner, so that
no bias is made larger than [heads, N, N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.backbones.blocks.neighborhood import check_heads, init_normal
from attnzoo.backbones.hosts.swin import from_windows, shift_mask, to_windows
from attnzoo.errors import check_range


def self_index(window: int) -> Tensor:
    """Rows of the bias table of a window's (query, key) pairs: [N, N], from 0."""
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = at[:, None] - at[None, :] + window - 1
    return apart[..., 0] * (2 * window - 1) + apart[..., 1]


def overlap_index(window: int, overlap: int) -> Tensor:
    """Rows of the bias table of (query, key) pairs, keys from a window of window + overlap: [N, M], partly NEGATIVE.

    Negative rows count from the table's end, as Python has it, and so the published tables are filled. The distance is
    moved by window - (window + overlap) + 1 where window - 1 would make it start from 0: the table is the one that
    starts from 0, rolled by `overlap_roll` rows.
    """
    outer = window + overlap
    query = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    key = torch.cartesian_prod(torch.arange(outer), torch.arange(outer))
    apart = key[None, :] - query[:, None] + window - outer + 1
    return apart[..., 0] * (window + outer - 1) + apart[..., 1]


def overlap_roll(window: int, overlap: int) -> int:
    """By how many rows a published bias table of OCAB lies before the one that starts from 0."""
    outer = window + overlap
    return (outer - 2) * (window + outer)


def window_masks(window: int, shift: int, like: Tensor) -> Tensor:
    """-100 between tokens of a moved window from different ends of the image: [last row?, last column?, N, N]."""
    masks = shift_mask((2 * window, 2 * window), (window, window), (shift, shift), like)
    return masks.unflatten(0, (2, 2))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    dropout: float = 0.0,
    masks: Tensor | None = None,
) -> Tensor:
    """Attention in each window: [B, rows, columns, N, heads, d] on [..., M, heads, d] -> [..., N, heads * d].

    bias: [heads, N, M], added to the logits. masks: those of `window_masks`.
    """
    width = query.shape[-1]
    if width % 8:  # the fused kernels of GPUs want multiples of 8; zeros change nothing
        query, key, value = (F.pad(t, (0, -width % 8)) for t in (query, key, value))

    def part(row: slice, column: slice, added: Tensor) -> Tensor:
        q, k, v = (t[:, row, column].flatten(0, 2).transpose(1, 2) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None].to(q.dtype), dropout_p=dropout, scale=scale)
        return out[..., :width].transpose(1, 2).flatten(2).unflatten(0, query[:, row, column].shape[:3])

    if masks is None:
        return part(slice(None), slice(None), bias)
    inner, last = slice(None, -1), slice(-1, None)
    rows = []
    for i, row in enumerate((inner, last) if query.shape[1] > 1 else (last,), start=int(query.shape[1] == 1)):
        columns = [part(row, inner, bias + masks[i, 0] if i else bias)] if query.shape[2] > 1 else []
        rows.append(torch.cat([*columns, part(row, last, bias + masks[i, 1])], dim=2))
    return torch.cat(rows, dim=1)


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a bias table [rows, heads] at `index` [N, M], as [heads, N, M]."""
    return table[index.flatten()].unflatten(0, tuple(index.shape)).permute(2, 0, 1)


class WindowAttention(nn.Module):
    """Softmax attention with a relative position bias in windows [B, rows, columns, N, dim].

    window: side of the windows. scale: of the logits, None for head_dim ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        window: int,
        num_heads: int,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        init_normal(self.relative_position_bias_table)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor | None = None) -> Tensor:
        """index: `self_index(window)`. masks: `window_masks` where the windows are moved."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        bias = bias_of(self.relative_position_bias_table, index)
        dropout = self.attn_drop if self.training else 0.0
        return self.proj_drop(self.proj(attend(query, key, value, bias, self.scale, dropout, masks)))


class ChannelAttention(nn.Module):
    """Channels weighted by gates made of their means over the map: [B, dim, H, W]."""

    def __init__(self, dim: int, squeeze_factor: int) -> None:
        super().__init__()
        check_range("squeeze_factor", squeeze_factor, 1, dim)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim // squeeze_factor, 1),
            nn.ReLU(),
            nn.Conv2d(dim // squeeze_factor, dim, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class ChannelAttentionBlock(nn.Module):
    """CAB: two convolutions with a bottleneck between them, and channel attention: [B, dim, H, W]."""

    def __init__(self, dim: int, compress_ratio: int = 3, squeeze_factor: int = 30) -> None:
        super().__init__()
        check_range("compress_ratio", compress_ratio, 1, dim)
        self.cab = nn.Sequential(
            nn.Conv2d(dim, dim // compress_ratio, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // compress_ratio, dim, 3, padding=1),
            ChannelAttention(dim, squeeze_factor),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x)


class HAB(nn.Module):
    """Hybrid attention block, see the module's text; H and W must be multiples of the window.

    Args:
        dim, num_heads: channels, heads.
        window: side of the windows.
        shift: by how much the windows are moved.
        compress_ratio, squeeze_factor: bottlenecks of CAB's convolutions and of its gates.
        conv_scale: weight of CAB.
        mlp_ratio, qkv_bias, scale: width of the MLP, bias of the projections, scale of the logits.
        proj_drop, attn_drop, drop_path: rates.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        shift: int = 0,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_range("shift", shift, 0, window - 1)
        self.window, self.shift, self.conv_scale = window, shift, conv_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads, qkv_bias, scale, attn_drop, proj_drop)
        self.conv_block = ChannelAttentionBlock(dim, compress_ratio, squeeze_factor)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor, index: Tensor, masks: Tensor | None = None) -> Tensor:
        """index: `self_index(window)`; masks: `window_masks(window, shift, x)`, made here where None; both may be
        shared by all blocks."""
        size, window = (x.shape[1], x.shape[2]), (self.window, self.window)
        normed = self.norm1(x)
        gated = self.conv_block(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.shift:
            normed = torch.roll(normed, (-self.shift, -self.shift), (1, 2))
            masks = window_masks(self.window, self.shift, normed) if masks is None else masks
        else:
            masks = None
        tokens = to_windows(normed, window).unflatten(0, (-1, size[0] // self.window, size[1] // self.window))
        attended = from_windows(self.attn(tokens, index, masks), window, size)
        if self.shift:
            attended = torch.roll(attended, (self.shift, self.shift), (1, 2))
        x = x + self.drop_path(attended) + gated * self.conv_scale
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OCAB(nn.Module):
    """Overlapping cross-attention block, see the module's text; H and W must be multiples of the window.

    Args:
        dim, num_heads: channels, heads.
        window: side of the queries' windows.
        overlap: by how much the keys' windows are larger; even.
        mlp_ratio, qkv_bias, scale: as for HAB.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        overlap: int,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if overlap < 0 or overlap % 2:
            raise ValueError(
                f"overlap must be even and not negative, got {overlap}: the larger window has as much on either side "
                "of its window (overlap is int(window_size * overlap_ratio))"
            )
        self.window, self.overlap, self.num_heads = window, overlap, num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window + overlap - 1) ** 2, num_heads))
        init_normal(self.relative_position_bias_table)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def _outer_windows(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, rows, columns, M, heads, d], zeros outside."""
        around, outer = self.overlap // 2, self.window + self.overlap
        x = F.pad(x, (0, 0, around, around, around, around))
        x = x.unfold(1, outer, self.window).unfold(2, outer, self.window)  # [B, rows, columns, dim, outer, outer]
        return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """index: `overlap_index(window, overlap)`."""
        size, window = (x.shape[1], x.shape[2]), (self.window, self.window)
        query, key, value = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        query = to_windows(query, window).unflatten(0, (-1, size[0] // self.window, size[1] // self.window))
        query = query.unflatten(-1, (self.num_heads, -1))
        bias = bias_of(self.relative_position_bias_table, index)
        out = attend(query, self._outer_windows(key), self._outer_windows(value), bias, self.scale)
        x = self.proj(from_windows(out, window, size)) + x
        return x + self.mlp(self.norm2(x))


class AttentionBlocks(nn.Module):
    """HABs, every other one with moved windows, and an OCAB."""

    def __init__(self, blocks: list[HAB], overlap_attn: OCAB) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.overlap_attn = overlap_attn
        self.grad_checkpointing = False

    def forward(self, x: Tensor, index: Tensor, overlap_index: Tensor, masks: Tensor | None) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, index, masks, use_reentrant=False)
            else:
                x = block(x, index, masks)
        return self.overlap_attn(x, overlap_index)


class RHAG(nn.Module):
    """Residual hybrid attention group: the blocks, `conv` on [B, dim, H, W], and the input again."""

    def __init__(self, residual_group: AttentionBlocks, conv: nn.Module) -> None:
        super().__init__()
        self.residual_group = residual_group
        self.conv = conv

    def forward(self, x: Tensor, index: Tensor, overlap_index: Tensor, masks: Tensor | None) -> Tensor:
        out = self.residual_group(x, index, overlap_index, masks)
        return self.conv(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) + x


class Upsample(nn.Sequential):
    """Convolution and pixel shuffle: `scale` a power of two in steps of two (1: nothing), or 3 at once."""

    def __init__(self, scale: int, dim: int) -> None:
        if scale < 1 or (scale & (scale - 1) and scale != 3):
            raise ValueError(f"scale must be 3 or a power of two, got {scale}")
        layers: list[nn.Module] = []
        for step in [3] if scale == 3 else [2] * (scale.bit_length() - 1):
            layers += [nn.Conv2d(dim, step * step * dim, 3, padding=1), nn.PixelShuffle(step)]
        super().__init__(*layers)


def fit_window(window: int, shift: int, size: tuple[int, int]) -> tuple[int, int]:
    """Window and shift of a block that is built for maps of `size`: a smaller side is the window, which then does not
    move (nor where it is just the window)."""
    return (min(size), 0) if min(size) <= window else (window, shift)


__all__ = ["HAB", "OCAB", "RHAG", "AttentionBlocks", "Upsample", "WindowAttention", "overlap_index", "self_index"]
