"""StyA2K's all-to-key attention, a module for feature maps of a content and a style image.

Paper: Zhu et al., "All-to-key Attention for Arbitrary Style Transfer", arXiv:2212.04105 (ICCV 2023). Code:
LearningHx/StyA2K, models/networks.py (no licence file; written from the formulas). The VGG encoder and the decoder
around it are not part of this.

Per head, without a scale of the logits. The style map is cut into n regions of r pixels. Distributed attention: each
region gives one key, its mean k_c and its pixels k_j weighted by s_j = sigmoid(beta + alpha <k_c, k_j>),

    K = (sum_j s_j k_j + k_c) / (r + 1),    V likewise with the same s and the mean of v,

and every content pixel softmaxes over the n keys. Progressive attention: every content region chooses the one style
region with the largest sum_p <q_p, k_p> over its pixels p, and its pixels softmax over that region's r pixels. The
cost is linear in pixels. Differences from the authors' code: the maps need not be square.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import check_range, check_tensor

__all__ = ["AllToKeyAttention", "StyleTransform"]


def _normalized(x: Tensor) -> Tensor:
    """Each channel of each sample to mean 0 and (unbiased) variance 1."""
    variance, mean = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt()


class AllToKeyAttention(nn.Module):
    """Content [B, in_planes, H, W] and style [B, in_planes, Hs, Ws] -> [B, in_planes, H, W].

    in_planes: channels, divisible by num_heads. region: side of a region in pixels; a remainder of the map that fills
    no region takes no part and gets content and the biases only. Both maps must hold at least one region. Raises
    ValueError for maps of other shapes.
    """

    def __init__(self, in_planes: int, region: int = 8, num_heads: int = 8) -> None:
        super().__init__()
        check_range("region", region, low=1)
        if in_planes % num_heads:
            raise ValueError(f"in_planes must be divisible by num_heads={num_heads}, got {in_planes}")
        self.region, self.num_heads = region, num_heads
        self.sim_alpha = nn.Parameter(torch.ones(1))
        self.sim_beta = nn.Parameter(torch.zeros(1))
        self.q, self.k, self.v, self.q2, self.k2, self.v2, self.fusion1, self.fusion2 = (
            nn.Conv2d(in_planes, in_planes, 1) for _ in range(8)
        )

    def _regions(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, heads, regions, pixels, head_dim], both row by row."""
        rows, columns = (n // self.region for n in x.shape[-2:])
        x = x[..., : rows * self.region, : columns * self.region]
        x = x.unflatten(3, (columns, self.region)).unflatten(2, (rows, self.region)).unflatten(1, (self.num_heads, -1))
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3)

    def _map(self, x: Tensor, size: torch.Size) -> Tensor:
        """The inverse of `_regions`; zeros where the map has a remainder."""
        rows, columns = (n // self.region for n in size)
        x = x.unflatten(3, (self.region, self.region)).unflatten(2, (rows, columns))
        x = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))

    def distributed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every pixel attends one key per region; all [B, heads, regions, pixels, head_dim]."""
        centre, mean = key.mean(3, keepdim=True), value.mean(3, keepdim=True)
        near = torch.sigmoid(self.sim_beta + self.sim_alpha * (key * centre).sum(-1, keepdim=True))
        count = key.shape[3] + 1
        keys = ((near * key).sum(3) + centre[:, :, :, 0]) / count
        values = ((near * value).sum(3) + mean[:, :, :, 0]) / count
        out = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, scale=1.0)
        return out.unflatten(2, query.shape[2:4])

    def matched(self, query: Tensor, key: Tensor) -> Tensor:
        """int64 [B, heads, content regions]: the style region that each content region is most like."""
        return (query.flatten(3) @ key.flatten(3).transpose(2, 3)).argmax(-1)

    def progressive(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every pixel attends the pixels of one region, the one that its own region is most like."""
        chosen = self.matched(query, key)[..., None, None].expand(-1, -1, -1, *key.shape[3:])
        return F.scaled_dot_product_attention(query, key.gather(2, chosen), value.gather(2, chosen), scale=1.0)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        for name, x in (("content", content), ("style", style)):
            check_tensor(name, x, ndim=4)
            if x.shape[1] != self.q.in_channels or min(x.shape[-2:]) < self.region:
                raise ValueError(
                    f"{name} must be [B, {self.q.in_channels}, H, W] with sides of at least {self.region}, "
                    f"got {tuple(x.shape)}"
                )
        if len(content) != len(style):
            raise ValueError(f"style must have content's batch of {len(content)}, got {len(style)}")
        plain, styled = _normalized(content), _normalized(style)
        first = (self._regions(conv(x)) for conv, x in ((self.q, plain), (self.k, styled), (self.v, style)))
        second = (self._regions(conv(x)) for conv, x in ((self.q2, plain), (self.k2, styled), (self.v2, style)))
        size = content.shape[-2:]
        distributed, progressive = self._map(self.distributed(*first), size), self._map(self.progressive(*second), size)
        return self.fusion1(distributed) + self.fusion2(progressive) + content


class StyleTransform(nn.Module):
    """Two levels of features joined: [B, C, H, W] and [B, C, H // 2, W // 2] of content and style -> [B, C, H, W]."""

    def __init__(self, in_planes: int) -> None:
        super().__init__()
        self.attn_adain_4_1 = AllToKeyAttention(in_planes, region=8)
        self.attn_adain_5_1 = AllToKeyAttention(in_planes, region=4)
        self.merge_conv = nn.Conv2d(in_planes, in_planes, 3, padding=1, padding_mode="reflect")

    def forward(self, content4: Tensor, style4: Tensor, content5: Tensor, style5: Tensor) -> Tensor:
        fine = self.attn_adain_4_1(content4, style4)
        coarse = self.attn_adain_5_1(content5, style5)
        return self.merge_conv(fine + F.interpolate(coarse, scale_factor=2.0))
