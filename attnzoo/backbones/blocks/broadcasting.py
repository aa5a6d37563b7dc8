"""Context broadcasting: every token gets the mean of all tokens, uniform attention given for nothing.

Paper: "Scratching Visual Transformer's Back with Uniform Attention", Hyeon-Woo, Yu-Ji, Heo, Han, Oh, Oh, ICCV 2023 -
https://arxiv.org/abs/2210.08457
Code: none was at hand; written here from the paper's formula.

What follows which statement: CB(x_i) = (x_i + mean over all tokens of x) / 2 for every token, the average-pooled token
given back to the tokens; it stands at the end of the MLP of each block; it has no parameters (the abstract: "1 line in
your model code, no additional parameters"). The mean is over all tokens that the MLP sees, class token included.

`adapted`: no numbers of the authors' are held against it, and the variant with learned scales per dimension (CB_S) is
left out, because its initial values were not found.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from attnzoo.errors import check_tensor

__all__ = ["BroadcastingMlp", "ContextBroadcasting"]


class ContextBroadcasting(nn.Module):
    """[B, N, dim] -> the mean of each token and the mean of all tokens, the same shape; no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, ndim=3)
        return (x + x.mean(1, keepdim=True)) / 2


class BroadcastingMlp(Mlp):
    """timm's Mlp with context broadcasting at its end: `timm.create_model(vit, mlp_layer=BroadcastingMlp)`.

    timm's arguments and parameter names, so a ViT's weights load.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.broadcast = ContextBroadcasting()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        return self.broadcast(super().forward(x))
