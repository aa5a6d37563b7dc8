"""Stochastically subsampled attention (SSA): while training, queries see a random part of the keys.

Paper: "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles", Hussain, Zaki, Subramanian,
KDD 2023 - https://arxiv.org/abs/2306.01705
Code: none published for this method (the repository holds a README and a figure); written here from the description.

What follows which statement: the unbiased form of the figure. In each layer one random permutation of the sources is
drawn per call, and its first k sources, exactly k and without replacement, are kept for ALL queries, heads and samples;
at inference all sources are attended to. The softmax is over the kept sources, without rescaling.

`adapted`: the paper's locally biased form (a locally biased shuffle, then windowed attention) is left out, because its
shuffle is not described where we could read it. Prefix tokens (class, registers) are never dropped here: the figure is
of sequences without such tokens, and a ViT's classifier reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from attnzoo.errors import UnsupportedError, check_range

__all__ = ["SubsampledAttention"]


class SubsampledAttention(Attention):
    """timm's attention, with a random part of the keys while training.

    Args:
        dim, num_heads, and the rest: timm's.
        keep_rate: of the sources that can be dropped, ceil(keep_rate * n) are kept per training step.
        prefix_tokens: the first tokens, always kept.

    Parameters and inference are timm's. For a ViT: `attn_layer=SubsampledAttention.with_rate(0.25)`.
    """

    def __init__(self, *args: Any, keep_rate: float = 0.25, prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_range("keep_rate", keep_rate, 0.0, 1.0)
        check_range("prefix_tokens", prefix_tokens, low=0)
        if keep_rate == 0.0 and prefix_tokens == 0:
            raise ValueError(
                "keep_rate must be above 0 where there are no prefix_tokens, got 0.0: nothing would be left"
            )
        if self.gate is not None:
            raise UnsupportedError("gated must be False")
        self.keep_rate = keep_rate
        self.prefix_tokens = prefix_tokens

    @classmethod
    def with_rate(cls, keep_rate: float, prefix_tokens: int = 1) -> type[SubsampledAttention]:
        """A class with these values, for timm's `attn_layer` (which must be a class)."""

        class Subsampled(cls):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{"keep_rate": keep_rate, "prefix_tokens": prefix_tokens, **kwargs})

        return Subsampled

    def sources(self, count: int, device: torch.device) -> Tensor:
        """The kept sources of `count` tokens, drawn anew: prefix tokens, then ceil(keep_rate * rest) others."""
        rest = count - self.prefix_tokens
        drawn = torch.randperm(rest, device=device)[: math.ceil(self.keep_rate * rest)] + self.prefix_tokens
        return torch.cat([torch.arange(self.prefix_tokens, device=device), drawn])

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        if not self.training or self.keep_rate == 1.0:
            return super().forward(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask and is_causal are not supported while training: sources are dropped")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        kept = self.sources(x.shape[1], x.device)
        out = F.scaled_dot_product_attention(
            query, key[:, :, kept], value[:, :, kept], dropout_p=self.attn_drop.p, scale=self.scale
        )
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))
