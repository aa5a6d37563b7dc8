"""InLine attention: linear attention whose weights of one query sum to one, and a local convolution made from the
input.

Paper: "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han et al., NeurIPS 2024, arXiv:2412.06590,
equations 5 and 8. Parameter names are those of the authors' published checkpoints.

    out = (s / n) phi(q) phi(K)^T V + (1 - s phi(q) . mean phi(k)) mean v + Conv3x3(v; weights(mean of the input)),
    s = head_dim ** -0.5, n the number of tokens; phi is the identity in every published model

No softmax and no normaliser; one depthwise 3 x 3 filter per image (per window) and channel, zero padding, no bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.backbones.hosts.mixers import MIXERS, Mixer, Site, Size
from attnzoo.errors import check_choice
from attnzoo.kernels import linear_attention

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "exp": lambda x: (0.2 * x).exp(),
}


class InLineMixer(Mixer):
    """InLine attention between a host's projections. Works on maps of any size; a mask is ignored, as by the authors.

    kernel: phi, one of "identity", "relu", "leakyrelu", "exp" (exp(0.2 x)).
    """

    def __init__(self, site: Site, kernel: str = "identity") -> None:
        super().__init__(site)
        check_choice("kernel", kernel, KERNELS)
        if site.size != site.key_size:
            raise ValueError(
                f"InLine attention needs keys at the queries' resolution (its convolution adds values to queries), got "
                f"queries on {site.size} and keys on {site.key_size}: set la_sr_ratios to 1 in its stages"
            )
        self.kernel = kernel
        dim, groups = site.dim, site.num_heads
        self.residual = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=groups, **site.dd),
            nn.GELU(),
            nn.Conv1d(dim, 9 * dim, 1, groups=groups, **site.dd),
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        size: Size,
        key_size: Size,
        context: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        batch, _, dim = query.shape
        prefix, phi = self.num_prefix, KERNELS[self.kernel]
        q, k, v = self.heads(phi(query)), self.heads(phi(key)), self.heads(value)
        out = linear_attention(q, k, v, normaliser="subtract").flatten(2)
        weights = self.residual(context.mean(dim=1)[..., None]).reshape(batch * dim, 1, 3, 3)
        grid = value[:, prefix:].transpose(1, 2).reshape(1, batch * dim, *size)
        local = F.conv2d(grid, weights.to(grid.dtype), padding=1, groups=batch * dim)
        local = local.reshape(batch, dim, -1).transpose(1, 2)
        return torch.cat([out[:, :prefix], out[:, prefix:] + local], dim=1) if prefix else out + local


def inline_mixer(kernel: str = "identity") -> Callable[[Site], InLineMixer]:
    """InLineMixer with the given phi."""
    return lambda site: InLineMixer(site, kernel)


MIXERS["inline"] = InLineMixer
