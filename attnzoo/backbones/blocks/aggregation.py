"""QAA: an image as the similarity of queries that read it with queries that don't.

Paper: "Query-Based Adaptive Aggregation for Multi-Dataset Joint Training Toward Universal Visual Place Recognition",
Xiao, Zhou, Loianno, 2025 - https://arxiv.org/abs/2507.03831
Code: https://github.com/arplaboratory/QAA, licence not verified. Only states of its development are at hand, in which
the similarity is still behind an optimal-transport step that the paper does away with; written here from the paper's
statements, `adapted`. Names of parameters and defaults are the development state's (`queries_feature`, `queries_score`,
`score`; 256 queries of 16 heads, 64 x 128 numbers), and were held to no published checkpoint.

What follows which statement:

- "Learned queries form an image-independent reference codebook via self-attention" (project page): F [queries, C_r] is
  LayerNorm(q + attention(q, q, q)) of learned q.
- "Query-level image features": other learned queries, treated alike, cross-attend to the frozen backbone's patch
  tokens, and a linear layer leads to P [queries, C_f]. (`out_norm`: a LayerNorm between; off in the training files.)
- Cross-query similarity "replaces all complex score-based aggregation (softmax, optimal transport) with one matrix
  multiply" (project page): S = F^T P, C_r x C_f numbers.
- The columns of S are normalised (the development state's last lines), then the descriptor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.blocks.neighborhood import check_heads
from attnzoo.backbones.blocks.probing import Probe, frozen_host
from attnzoo.errors import check_range, check_tensor

__all__ = ["QueryAggregation", "attach_aggregation"]


class _Queries(nn.Module):
    """Learned queries [1, count, dim] after self-attention with a residual, and a LayerNorm."""

    def __init__(self, count: int, dim: int, num_heads: int, dd: dict[str, Any]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, count, dim, **dd))
        if not self.queries.is_meta:
            nn.init.normal_(self.queries)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True, **dd)
        self.norm_q = nn.LayerNorm(dim, **dd)

    def forward(self) -> Tensor:
        queries = self.queries
        return self.norm_q(queries + self.self_attn(queries, queries, queries, need_weights=False)[0])


class _Reading(nn.Module):
    """Queries cross-attend to tokens; a linear layer (a 1-wide convolution, by its published shape) narrows them."""

    def __init__(self, dim: int, out_dim: int, num_heads: int, out_norm: bool, dd: dict[str, Any]) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True, **dd)
        self.norm_out = nn.LayerNorm(dim, **dd) if out_norm else nn.Identity()
        self.conv = nn.Conv1d(dim, out_dim, 1, **dd)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """[1, Q, dim], [B, N, dim] -> [B, out_dim, Q]."""
        queries = queries.expand(len(x), -1, -1)
        return self.conv(self.norm_out(self.cross_attn(queries, x, x, need_weights=False)[0]).mT)


class QueryAggregation(nn.Module):
    """QAA's head: tokens [B, N, dim], in any order and number, -> unit descriptors [B, reference_dim * feature_dim].

    Args:
        dim: width of the tokens.
        num_queries: of either kind.
        feature_dim: C_f, the width of the queries that read the image, after their linear layer.
        reference_dim: C_r, the width of the codebook.
        num_heads: of all attentions; must divide dim and reference_dim.
        out_norm: a LayerNorm before the linear layer.

    Entry (r, f) of the descriptor stands at r * feature_dim + f. Both queries' self-attention reads no image:
    `codebook()` is F.
    """

    def __init__(
        self,
        dim: int,
        num_queries: int = 256,
        feature_dim: int = 64,
        reference_dim: int = 128,
        num_heads: int = 16,
        out_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        for name, value in (
            ("num_queries", num_queries),
            ("feature_dim", feature_dim),
            ("reference_dim", reference_dim),
        ):
            check_range(name, value, low=1)
        check_heads(dim, num_heads)
        if reference_dim % num_heads:
            raise ValueError(f"num_heads must divide reference_dim={reference_dim}, got {num_heads}")
        self.out_features = reference_dim * feature_dim
        self.queries_feature = _Queries(num_queries, reference_dim, num_heads, dd)
        self.queries_score = _Queries(num_queries, dim, num_heads, dd)
        self.score = _Reading(dim, feature_dim, num_heads, out_norm, dd)

    def codebook(self) -> Tensor:
        """F: [num_queries, reference_dim], the same for every image."""
        return self.queries_feature()[0]

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, reference_dim * feature_dim], of length 1."""
        check_tensor("x", x, ndim=3)
        similarity = torch.einsum("qr,bfq->brf", self.codebook(), self.score(self.queries_score(), x))
        return F.normalize(F.normalize(similarity, dim=1).flatten(1), dim=-1)


def attach_aggregation(model: nn.Module, *, prefix_tokens: bool = False, **kwargs: Any) -> Probe:
    """QAA on `model`, any timm model, frozen in place: images -> unit descriptors, for retrieval by dot product.

    prefix_tokens: let class and register tokens be read too. kwargs: of QueryAggregation (num_queries, feature_dim,
    reference_dim, num_heads, out_norm). Only `probe.head` has parameters that learn; it has the model's device and
    dtype.
    """
    width, options = frozen_host(model)
    return Probe(model, QueryAggregation(width, **{**options, **kwargs}), prefix_tokens)
