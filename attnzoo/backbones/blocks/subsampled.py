"""Stochastically subsampled attention (SSA): while training, queries see a random part of the keys.

Paper: "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles", Hussain, Zaki, Subramanian,
KDD 2023 - https://arxiv.org/abs/2306.01705
Code: none published for this method (the repository holds a README, a page and a figure); written here from the
description, `adapted`.

What follows which statement:

- Unbiased form (the figure; `SubsampledAttention`): in each layer one random permutation of the sources is drawn per
  call, and its first k sources, exactly k and without replacement, are kept for ALL queries, heads and samples. The
  softmax is over the kept sources, without rescaling.
- Locally biased form (the figure; `LocallySubsampledAttention`): a locally biased shuffle of the sources, then windowed
  attention; "a locally-biased sampling to prioritize key connections" (the page).
- At inference all sources are attended to.

Ours, where we could read no statement: prefix tokens (class, registers), which the figure does not have, are never
dropped, and read all sources. The locally biased shuffle sorts positions plus Gaussian noise of `sigma` tokens along
every row, then along every column: sigma = 0 leaves all in place, and the larger, the more the sources come from
anywhere. The window slides and moves inward at the border (`neighborhood_attention`: no N x N matrix is formed).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

from attnzoo.backbones.blocks.neighborhood import refuse_attn_drop
from attnzoo.errors import UnsupportedError, check_range, per_axis
from attnzoo.kernels import neighborhood_attention

__all__ = ["LocallySubsampledAttention", "SubsampledAttention", "local_shuffle"]


class _TrainedOnPart(Attention):
    """timm's attention, all of it at inference; subclasses say in `_attend` what is attended to while training."""

    def __init__(self, *args: Any, prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_range("prefix_tokens", prefix_tokens, low=0)
        if self.gate is not None:
            raise UnsupportedError("gated must be False")
        self.prefix_tokens = prefix_tokens

    @property
    def _whole(self) -> bool:
        return not self.training

    @abstractmethod
    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [B, N, heads, head_dim] -> the same shape."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        if self._whole:
            return super().forward(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attn_mask and is_causal are not supported while training: sources are dropped")
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        out = self._attend(self.q_norm(query), self.k_norm(key), value)
        return self.proj_drop(self.proj(self.norm(out.flatten(2))))

    def _dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        drop = self.attn_drop.p
        return F.scaled_dot_product_attention(query, key, value, dropout_p=drop, scale=self.scale).transpose(1, 2)


class SubsampledAttention(_TrainedOnPart):
    """timm's attention, with a random part of the keys while training.

    Args:
        dim, num_heads, and the rest: timm's.
        keep_rate: of the sources that can be dropped, ceil(keep_rate * n) are kept per training step.
        prefix_tokens: the first tokens, always kept.

    Parameters and inference are timm's. For a ViT: `attn_layer=SubsampledAttention.with_rate(0.25)`.
    """

    def __init__(self, *args: Any, keep_rate: float = 0.25, prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, prefix_tokens=prefix_tokens, **kwargs)
        check_range("keep_rate", keep_rate, 0.0, 1.0)
        if keep_rate == 0.0 and prefix_tokens == 0:
            raise ValueError(
                "keep_rate must be above 0 where there are no prefix_tokens, got 0.0: nothing would be left"
            )
        self.keep_rate = keep_rate

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

    @property
    def _whole(self) -> bool:
        return not self.training or self.keep_rate == 1.0

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = self.sources(query.shape[1], query.device)
        return self._dense(query, key[:, kept], value[:, kept])


def local_shuffle(height: int, width: int, sigma: float, device: Any = None) -> Tensor:
    """Which source stands at each place of a map after a locally biased shuffle: a permutation of height * width.

    sigma: standard deviation, in tokens, of the noise by which positions are sorted along rows, then along columns.
    """
    order = torch.arange(height * width, device=device).view(height, width)
    for axis, size in ((1, width), (0, height)):
        place = torch.arange(size, device=device).view((1, -1) if axis else (-1, 1))
        noisy = place + sigma * torch.randn(height, width, device=device)
        order = order.gather(axis, noisy.argsort(axis))
    return order.flatten()


class LocallySubsampledAttention(_TrainedOnPart):
    """timm's attention; while training, a window over locally shuffled sources.

        layer = as_attn_layer(LocallySubsampledAttention, kernel_size=7, sigma=2.0)
        timm.create_model("vit_tiny_patch16_224", attn_layer=layer)

    Args:
        dim, num_heads, and the rest: timm's; attn_drop must be 0.0.
        kernel_size: sources that a query sees per axis, one int or (height, width); at most the map.
        sigma: of the shuffle, in tokens, see `local_shuffle`; one permutation per layer and call, for all samples and
            heads.
        grid_size: the map in tokens, one int or (height, width); None for a square of what follows the prefix tokens.
        prefix_tokens: the first tokens: in no window, always seen, and reading all.

    Parameters and inference are timm's.
    """

    def __init__(
        self,
        *args: Any,
        kernel_size: int | tuple[int, int] = 7,
        sigma: float = 1.0,
        grid_size: int | tuple[int, int] | None = None,
        prefix_tokens: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, prefix_tokens=prefix_tokens, **kwargs)
        refuse_attn_drop(self.attn_drop.p)
        check_range("sigma", sigma, low=0.0)
        self.kernel_size = per_axis("kernel_size", kernel_size, 2, low=1)
        self.grid_size = None if grid_size is None else per_axis("grid_size", grid_size, 2, low=1)
        self.sigma = sigma

    def _grid(self, count: int) -> tuple[int, int]:
        side = math.isqrt(max(count, 0))
        height, width = (side, side) if self.grid_size is None else self.grid_size
        if count < 1 or height * width != count:
            wanted = "a square of tokens" if self.grid_size is None else f"grid_size {height} x {width}"
            raise ValueError(f"x must hold {self.prefix_tokens} prefix_tokens and {wanted}, got {count} after them")
        return height, width

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = self.prefix_tokens
        grid = self._grid(query.shape[1] - first)
        order = local_shuffle(*grid, self.sigma, query.device) + first
        extra = (key[:, :first], value[:, :first]) if first else (None, None)
        local = neighborhood_attention(
            query[:, first:].unflatten(1, grid),
            key[:, order].unflatten(1, grid),
            value[:, order].unflatten(1, grid),
            self.kernel_size,
            scale=self.scale,
            additional_keys=extra[0],
            additional_values=extra[1],
        ).flatten(1, 2)
        return torch.cat([self._dense(query[:, :first], key, value), local], 1) if first else local
