"""Attention maps written out, where a method looks at them; never for more than 4,096 queries."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.generators.chain import Layer

MOST = 4096  # queries up to which the room forms a matrix of queries and keys


def attention_logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """query key^T * scale under an SDPA mask (bool, or additive), [B, heads, N, M]; scale: head_dim ** -0.5 if None."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask


def attention_map(query: Tensor, key: Tensor, mask: Tensor | None, layer: Layer) -> Tensor:
    """The attention of one layer averaged over heads, [B, N, M]. Raises UnsupportedError above 4,096 queries."""
    if query.shape[-2] > MOST:
        raise UnsupportedError(f"{layer.name}: maps are recorded up to {MOST} queries, got {query.shape[-2]}")
    return attention_logits(query, key, mask, layer.scale).softmax(-1).mean(1)
