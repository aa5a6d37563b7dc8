"""FAN's layers: token mixing, channel processing with a gate per channel, and the block of both.

Paper: "Understanding The Robustness in Vision Transformers", Zhou et al., ICML 2022, arXiv:2204.12451, section 3.
Parameter names are those of the authors' published checkpoints. Maps are channels-last, [batch, height, width, dim].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.xcit import LPI
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.backbones.blocks.tap import TokenAwarePooling

__all__ = ["ChannelProcessing", "FANBlock", "FANMlp", "TokenMixing", "attend"]


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, attentions: list[Tensor] | None
) -> Tensor:
    """Softmax attention of [B, heads, N, head_dim]; with a list given, the weights [B, heads, N, N] are appended to it
    (before dropout), and are formed only then."""
    if attentions is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)
    weights = (query * scale @ key.transpose(-2, -1)).softmax(-1)
    attentions.append(weights)
    return F.dropout(weights, dropout) @ value


class TokenMixing(nn.Module):
    """Multi-head self-attention with separate projections `q` and `kv`, on [B, H, W, dim].

    dim: channels. num_heads: heads. qkv_bias: bias of the projections. attn_drop, proj_drop: dropout of the weights and
    the output. forward's `attentions`: see `attend`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, check_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        size = x.shape[1:3]
        query = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        key, value = self.kv(x).flatten(1, 2).unflatten(-1, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        out = attend(query, key, value, self.head_dim**-0.5, dropout, attentions)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2).unflatten(1, size)))


class FANMlp(nn.Module):
    """fc2(h + gamma * local(h)), h = fc1(x): `local` is 3x3 depthwise, GELU, BatchNorm, 3x3 depthwise (XCiT's LPI), and
    there is no other activation. residual=False leaves the first h out, as the authors' FAN-Swin does."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        residual: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = LPI(hidden_dim, **dd)
        self.gamma = nn.Parameter(torch.ones(hidden_dim, **dd))
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        height, width = x.shape[1:3]
        hidden = self.fc1(x)
        local = self.dwconv(hidden.flatten(1, 2), height, width).unflatten(1, (height, width))
        local = self.drop(self.gamma * local)
        return self.drop(self.fc2(local + hidden if self.residual else local))


class ChannelProcessing(nn.Module):
    """Channel attention reduced to one gate a channel: gate * LayerNorm(FANMlp(x)), on [B, H, W, dim].

    gate = temperature * sigmoid(sum over tokens of softmax(W_q x) * mean over the head's channels of softmax(x)), both
    softmaxes over the tokens. There is no output projection.

    dim: channels. num_heads: heads, of the gate's mean. hidden_dim: of the MLP. qkv_bias: bias of W_q. attn_drop:
    dropout of the gates. drop: in the MLP. residual: see FANMlp.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        residual: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, check_heads(dim, num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.mlp_v = FANMlp(dim, hidden_dim, drop, residual, **dd)
        self.norm_v = nn.LayerNorm(dim, **dd)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.attn_drop = nn.Dropout(attn_drop)

    def gate(self, x: Tensor) -> Tensor:
        """The gates of a map [B, H, W, dim]: [B, heads, head_dim]."""
        query, key = (t.flatten(1, 2).softmax(1).unflatten(-1, (self.num_heads, self.head_dim)) for t in (self.q(x), x))
        return torch.einsum("bnhd,bnh->bhd", query, key.mean(-1)).sigmoid() * self.temperature[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.attn_drop(self.gate(x)).flatten(1)[:, None, None]
        return gate * self.norm_v(self.mlp_v(x))


class FANBlock(nn.Module):
    """x + gamma1 * TokenMixing(norm1(x)), then x + gamma2 * ChannelProcessing(norm2(x)), on [B, H, W, dim].

    Args:
        dim: channels. num_heads: heads of the token mixing.
        mlp_ratio: hidden width of the MLP over dim.
        channel_heads: heads of the channel processing, None for num_heads.
        qkv_bias: bias of the projections.
        drop, attn_drop: dropout. drop_path: stochastic depth rate of both branches.
        eta: initial gamma1 and gamma2.
        num_scales: token-aware pooling before the token mixing over so many scales; None for none.
        norm_layer: called with dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        channel_heads: int | None = None,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        eta: float = 1.0,
        num_scales: int | None = None,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.downsample: nn.Module | None = None  # a model with varying widths puts one here
        self.norm1 = norm_layer(dim, **dd)
        self.attn = TokenMixing(dim, num_heads, qkv_bias, attn_drop, drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ChannelProcessing(
            dim,
            channel_heads or num_heads,
            int(dim * mlp_ratio),
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            drop=drop,
            **dd,
        )
        self.gamma1 = nn.Parameter(torch.full((dim,), float(eta), **dd))
        self.gamma2 = nn.Parameter(torch.full((dim,), float(eta), **dd))
        self.dilation_predictor = None if num_scales is None else TokenAwarePooling(dim, num_scales, **dd)

    def forward(self, x: Tensor, attentions: list[Tensor] | None = None) -> Tensor:
        seen = x if self.dilation_predictor is None else self.dilation_predictor(x)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(seen), attentions))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))
