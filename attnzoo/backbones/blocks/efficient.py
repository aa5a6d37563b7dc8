"""Efficient attention: queries and keys normalised apart, so that keys and values are summed first.

Paper: "Efficient Attention: Attention with Linear Complexities", Shen, Zhang, Zhao, Yi, Li, WACV 2021 -
https://arxiv.org/abs/1812.01243 (section 3.2, softmax normalisation)
Code: https://github.com/cmsflash/efficient-attention, MIT licence; written here from the formulas. Parameter names of
`EfficientAttention` are the authors'; `EfficientTokenAttention` has those of timm's attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.errors import UnsupportedError, check_tensor

__all__ = ["EfficientAttention", "EfficientTokenAttention"]


def _efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax over channels of query, times (softmax over tokens of key)^T value: all [B, heads, N, width].

    `linear_attention`'s efficient mode, for heads of any width: a head may be a CNN stage wide, and that stops at 256.
    """
    return query.softmax(-1) @ (key.softmax(-2).transpose(-1, -2) @ value)


class EfficientAttention(nn.Module):
    """Efficient attention of a map, with 1x1 convolutions and a residual.

    Args:
        channels: of the map.
        key_channels, value_channels: of all heads together; None for channels.
        num_heads: must divide both.

    [B, C, H, W] -> the same shape. There is no scale.
    """

    def __init__(
        self,
        channels: int,
        key_channels: int | None = None,
        num_heads: int = 1,
        value_channels: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        key_channels, value_channels = key_channels or channels, value_channels or channels
        for name, width in (("key_channels", key_channels), ("value_channels", value_channels)):
            if num_heads < 1 or width % num_heads:
                raise ValueError(f"num_heads must divide {name}={width}, got {num_heads}")
        self.num_heads = num_heads
        self.keys = nn.Conv2d(channels, key_channels, 1, **dd)
        self.queries = nn.Conv2d(channels, key_channels, 1, **dd)
        self.values = nn.Conv2d(channels, value_channels, 1, **dd)
        self.reprojection = nn.Conv2d(value_channels, channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        check_tensor("x", x, ndim=4)
        query, key, value = (
            layer(x).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-1, -2)
            for layer in (self.queries, self.keys, self.values)
        )
        out = _efficient(query, key, value).transpose(-1, -2).flatten(1, 2).unflatten(-1, x.shape[2:])
        return x + self.reprojection(out)


class EfficientTokenAttention(nn.Module):
    """Efficient attention in place of a ViT's: `timm.create_model(vit, attn_layer=EfficientTokenAttention)`.

    timm's arguments and parameter names (`qkv`, `proj`), so a ViT's weights load; the block has the residual. [B, N,
    dim] -> the same shape. Masks, causal attention and attention dropout are refused: no weight of a pair of tokens is
    ever formed.
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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if attn_drop:
            raise UnsupportedError(f"attn_drop must be 0.0, got {attn_drop!r}: no attention weights are formed")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer must be given with qk_norm or scale_norm, got None")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.norm = norm_layer(dim, **dd) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask and is_causal are not supported: no pair of tokens has a weight here")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = _efficient(self.q_norm(query), self.k_norm(key), value).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(out)))
