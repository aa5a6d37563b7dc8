"""Flow-Attention: linear attention in which sources compete and sinks are allotted, as nn.Modules.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows", Wu et al., ICML 2022, arXiv:2202.06258. Parameter
names are those of the authors' code. The mathematics is `attnzoo.kernels.linear_attention(normaliser="flow")`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads, refuse_attn_drop
from attnzoo.errors import UnsupportedError
from attnzoo.kernels import linear_attention

__all__ = ["FlowAttention", "FlowSelfAttention"]


class FlowSelfAttention(nn.Module):
    """Flow-Attention of the vision model: one projection to queries, keys and values, all tokens to all tokens.

    It also is an `attn_layer` for timm's VisionTransformer, class token or none (it then takes part like any other).

    Args:
        dim: channels.
        num_heads: heads; each is dim // num_heads wide.
        qkv_bias, proj_bias: of the projections.
        qk_norm: a `norm_layer` over each head's queries and keys.
        attn_drop: must be 0.0 (UnsupportedError otherwise).
        proj_drop: dropout after the output projection.
        eps, outer_eps: see linear_attention; the authors' vision code has both at 1e-6.
        scale_norm: must be False (UnsupportedError otherwise).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 12,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        *,
        eps: float = 1e-6,
        outer_eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        refuse_attn_drop(attn_drop)
        if scale_norm:
            raise UnsupportedError(f"scale_norm must be False, got {scale_norm!r}: flow attention has no such norm")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.eps, self.outer_eps = eps, outer_eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.q_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **dd) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, *grid, dim] -> [B, *grid, dim]; a mask or is_causal is refused (see FlowAttention for the latter)."""
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask must be None and is_causal False: the vision model's flow has neither")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = linear_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            feature_map="sigmoid",
            normaliser="flow",
            eps=self.eps,
            outer_eps=self.outer_eps,
        )
        return self.proj_drop(self.proj(out.flatten(-2)))


class FlowAttention(nn.Module):
    """The authors' general layer: projections of their own for queries, keys and values, so that it can cross.

    Args:
        dim: channels of queries, keys and values as they come in.
        attn_dim: channels inside, shared by the heads.
        num_heads: heads; each is attn_dim // num_heads wide.
        dim_out: channels that come out, None for dim.
        is_causal: the authors' causal variant: every sum runs over the tokens up to a row's own.
        proj_drop: dropout after the output projection.
        eps: see linear_attention.
    """

    def __init__(
        self,
        dim: int,
        attn_dim: int,
        num_heads: int,
        dim_out: int | None = None,
        *,
        is_causal: bool = False,
        proj_drop: float = 0.0,
        eps: float = 1e-6,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = check_heads(attn_dim, num_heads)
        self.is_causal = is_causal
        self.eps = eps
        self.query_projection = nn.Linear(dim, attn_dim, **dd)
        self.key_projection = nn.Linear(dim, attn_dim, **dd)
        self.value_projection = nn.Linear(dim, attn_dim, **dd)
        self.out_projection = nn.Linear(attn_dim, dim if dim_out is None else dim_out, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """query [B, *grid, dim], key and value [B, *grid, dim] of a grid of their own -> [B, *query's grid, dim_out].

        key defaults to query, value to key.
        """
        key = query if key is None else key
        value = key if value is None else value
        out = linear_attention(
            self.query_projection(query).unflatten(-1, (self.num_heads, self.head_dim)),
            self.key_projection(key).unflatten(-1, (self.num_heads, self.head_dim)),
            self.value_projection(value).unflatten(-1, (self.num_heads, self.head_dim)),
            is_causal=self.is_causal,
            feature_map="sigmoid",
            normaliser="flow",
            eps=self.eps,
        )
        return self.proj_drop(self.out_projection(out.flatten(-2)))
