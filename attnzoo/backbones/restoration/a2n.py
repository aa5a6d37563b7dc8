"""A2N, the attention in attention network, for super-resolution.

Paper: "Attention in Attention Network for Image Super-Resolution", Chen, Gu and Zhang, arXiv:2104.09497
Code: https://github.com/haoyuc/A2N (code/model/aan.py), no licence named; written here from the formulas.

Its attention is no dot product: gates by pixel, and two weights per image that mix a branch with gates and one without.

    AAB: u = lrelu(W1 x);  a, b = softmax(ADM(mean u) / t)[:2];  x + W2 lrelu(a attention(u) + b conv3x3(u))
    attention(u) = k4(k3(u) * sigmoid(k2(lrelu(k1 u)))),  lrelu with slope 0.2

Differences from the authors' code: none in what it computes. The sizes, constants there, are arguments; A2N-M, a
comment there, is `plain_kernel=1` (no weights were published); another `upscale` than 2, 3 or 4 is refused (there it
fails at the first call). The published weights were trained on images of 0 to 255 (the default of the authors' option
rgb_range), which `restore` takes care of.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.backbones.blocks.neighborhood import unwrap_checkpoint
from attnzoo.backbones.restoration.contract import Restorer
from attnzoo.backbones.restoration.registry import Entry, register
from attnzoo.errors import check_choice, check_range

_SLOPE = 0.2


class PixelAttention(nn.Module):
    """[B, dim, H, W] times gates made of it pixel by pixel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x).sigmoid()


class AttentionBranch(nn.Module):
    """A convolution gated by a two-layer one of the same input, and a convolution of that."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.k1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.k2 = nn.Conv2d(dim, dim, 1)
        self.k3 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.k4 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.k2(F.leaky_relu(self.k1(x), _SLOPE)).sigmoid()
        return self.k4(self.k3(x) * gates)


class AAB(nn.Module):
    """Attention in attention block on maps [B, dim, H, W], see the module's text.

    Args:
        dim: channels.
        reduction: bottleneck of the layers that make the two weights.
        num_weights: of the softmax; the first two are used, as there.
        temperature: t.
        plain_kernel: of the branch without attention: 3 (A2N) or 1 (A2N-M).
    """

    def __init__(
        self, dim: int, reduction: int = 4, num_weights: int = 2, temperature: float = 30.0, plain_kernel: int = 3
    ) -> None:
        super().__init__()
        check_range("reduction", reduction, 1, dim)
        check_range("num_weights", num_weights, low=2)
        check_choice("plain_kernel", plain_kernel, (1, 3))
        self.temperature = temperature
        self.conv_first = nn.Conv2d(dim, dim, 1, bias=False)
        self.conv_last = nn.Conv2d(dim, dim, 1, bias=False)
        self.ADM = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(dim // reduction, num_weights, bias=False),
        )
        self.attention = AttentionBranch(dim)
        self.non_attention = nn.Conv2d(dim, dim, plain_kernel, padding=plain_kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.conv_first(x), _SLOPE)
        weights = (self.ADM(inner.mean(dim=(2, 3))) / self.temperature).softmax(-1)[..., None, None, None]
        mixed = self.attention(inner) * weights[:, 0] + self.non_attention(inner) * weights[:, 1]
        return self.conv_last(F.leaky_relu(mixed, _SLOPE)) + x


class A2N(Restorer):
    """Images [B, in_chans, H, W] of any size, values 0 to 255 -> [B, in_chans, upscale * H, upscale * W].

    Args:
        upscale: 2 or 3 in one step, 4 in two.
        embed_dim: channels of the blocks.
        up_dim: channels after the first upsampling.
        depth: blocks.
        in_chans: image channels.
        plain_kernel: see AAB.
    """

    value_range = 255.0

    def __init__(
        self,
        upscale: int = 4,
        embed_dim: int = 40,
        up_dim: int = 24,
        depth: int = 16,
        in_chans: int = 3,
        plain_kernel: int = 3,
    ) -> None:
        super().__init__()
        check_choice("upscale", upscale, (2, 3, 4))
        check_range("depth", depth, low=1)
        check_range("in_chans", in_chans, low=1)
        self.in_chans, self.upscale = in_chans, upscale
        self.steps = (2, 2) if upscale == 4 else (upscale,)
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.AAB_trunk = nn.Sequential(*(AAB(embed_dim, plain_kernel=plain_kernel) for _ in range(depth)))
        self.trunk_conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        for i in range(len(self.steps)):
            setattr(self, f"upconv{i + 1}", nn.Conv2d(up_dim if i else embed_dim, up_dim, 3, padding=1))
            setattr(self, f"att{i + 1}", PixelAttention(up_dim))
            setattr(self, f"HRconv{i + 1}", nn.Conv2d(up_dim, up_dim, 3, padding=1))
        self.conv_last = nn.Conv2d(up_dim, in_chans, 3, padding=1)

    def reach(self) -> int | None:
        """See `Restorer`: all of the image, by the means that make the blocks' weights, unless those are constant."""
        if any(bool(block.ADM[-1].weight.any()) for block in self.AAB_trunk):  # type: ignore[union-attr,index]
            return None
        ups = sum(2 / math.prod(self.steps[: i + 1]) for i in range(len(self.steps)))
        return math.ceil(2 + 2 * len(self.AAB_trunk) + ups + 1 / self.upscale)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> the blocks' maps [B, embed_dim, H, W]."""
        first = x = self.conv_first(x)
        for block in self.AAB_trunk:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return first + self.trunk_conv(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] of any size -> [B, in_chans, upscale * H, upscale * W]."""
        self._check_image(x)
        features = self.forward_features(x)
        for i, step in enumerate(self.steps, start=1):
            features = F.interpolate(features, scale_factor=float(step), mode="nearest")
            features = self.get_submodule(f"upconv{i}")(features)
            features = F.leaky_relu(self.get_submodule(f"att{i}")(features), _SLOPE)
            features = F.leaky_relu(self.get_submodule(f"HRconv{i}")(features), _SLOPE)
        enlarged = F.interpolate(x, scale_factor=float(self.upscale), mode="bilinear", align_corners=False)
        return self.conv_last(features) + enlarged


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The authors' checkpoint for `model`: nothing is renamed."""
    return dict(unwrap_checkpoint(state_dict))


_CFG = {
    "license": "none named",
    "paper_ids": ("arXiv:2104.09497",),
    "origin_url": "https://github.com/haoyuc/A2N",
}
for _scale, _params in ((2, 1_036_443), (3, 1_036_443), (4, 1_047_459)):
    register(f"a2n_x{_scale}", Entry(A2N, {"upscale": _scale}, "a2n", (f"aan_x{_scale}.pt",), _params, (), _CFG))
