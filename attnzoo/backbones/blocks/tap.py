"""Token-aware pooling before attention, and the loss that keeps attention diverse.

Paper: "Robustifying Token Attention for Vision Transformers" (TAP and ADL), Guo, Stutz, Schiele, ICCV 2023,
arXiv:2303.11126. Code: https://github.com/guoyongcs/TAPADL @6e4dbff, no licence file; written here from the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.errors import check_choice, check_range, check_tensor

__all__ = ["TokenAwarePooling", "attention_diversification_loss"]


def _dilated_average(x: Tensor, dilation: int) -> Tensor:
    """The mean of 3 x 3 tokens `dilation` apart; outside the map [B, H, W, C] are zeros, and they count."""
    height, width = x.shape[1:3]
    rows = F.pad(x, (0, 0, 0, 0, dilation, dilation))
    x = rows[:, :height] + x + rows[:, 2 * dilation :]
    columns = F.pad(x, (0, 0, dilation, dilation))
    return (columns[:, :, :width] + x + columns[:, :, 2 * dilation :]) / 9


class TokenAwarePooling(nn.Module):
    """Each token becomes a mix of itself and dilated 3 x 3 averages around it; a small network weighs the scales.

    sum over k of weights_k * average_k(x), average_0 = x; weights = softmax over k of conv3x3(BatchNorm(conv3x3(x))),
    one weight a token and scale, the same for all channels.

    dim: channels. num_scales: averages with dilation 1 to num_scales - 1, and the token itself.
    """

    def __init__(self, dim: int, num_scales: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        check_range("num_scales", num_scales, low=1)
        dd = {"device": device, "dtype": dtype}
        self.num_scales = num_scales
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False, **dd),
            nn.BatchNorm2d(num_scales, **dd),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False, **dd),
        )

    def weights(self, x: Tensor) -> Tensor:
        """The scales' weights at each token of a map [B, H, W, dim]: [B, H, W, num_scales]."""
        return self.proj(x.permute(0, 3, 1, 2)).softmax(1).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim]."""
        first, *others = self.weights(x).split(1, -1)
        out = first * x
        for k, weight in enumerate(others, 1):
            out = torch.addcmul(out, weight, _dilated_average(x, k))
        return out


def attention_diversification_loss(
    attentions: Sequence[Tensor], threshold: float = 2.0, compat: str | None = None
) -> Tensor:
    """How alike the queries' attention is: the mean cosine between each query's attention and the mean over queries.

    attentions: of each layer, softmax weights [B, heads, N, N], as a model's `forward_attentions` returns them (the
        method is about these matrices, so they have to be formed). They are averaged over heads; then entries of at
        most threshold / N, in the rows and in the mean row, become 0.
    threshold: in units of even attention. With the default 2 only tokens that draw twice their share on average count:
        spread-out attention has loss 0 and gradient 0.
    compat: None, or "official" for the authors' code as it is, which at batch size 1 compares each query with an even
        row instead of the mean row (for threshold > 1 the loss is then always 0).

    Returns a scalar (to be minimised): the layers' means, summed and divided by the number of layers + 1e-6.
    """
    check_choice("compat", compat, (None, "official"))
    if not attentions:
        raise ValueError("attentions must hold at least one layer's weights, got none")
    total = torch.zeros((), dtype=attentions[0].dtype, device=attentions[0].device)
    for index, weights in enumerate(attentions):
        check_tensor(f"attentions[{index}]", weights, ndim=4)
        rows = weights.mean(1)
        limit = threshold / rows.shape[-1]
        mean = rows.mean(1, keepdim=True)
        if compat == "official" and len(rows) == 1:
            mean = rows.mean(2, keepdim=True).expand_as(rows)
        rows, mean = (torch.where(t > limit, t, torch.zeros_like(t)) for t in (rows, mean))
        total = total + F.cosine_similarity(mean, rows, dim=-1).mean()
    return total / (len(attentions) + 1e-6)
