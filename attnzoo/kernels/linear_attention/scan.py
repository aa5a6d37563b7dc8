"""Prefix sums of outer products, u_i = sum over j <= i of (a_i . b_j) c_j, without a matrix of all pairs.

The tokens are cut into chunks of C: within a chunk the C x C products under the diagonal, before it the running sum of
b^T c. With C at least as wide as a head, the running sums of all chunks take no more room than c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def scan(a: Tensor, b: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    """u [g, N, E] of a, b [g, N, D] and c [g, N, E]; reverse: the sum over j >= i."""
    heads, num_tokens, width = a.shape
    size = min(num_tokens, max(CHUNK, width, c.shape[2]))
    missing = -num_tokens % size
    if missing:
        a, b, c = (F.pad(t, (0, 0, 0, missing)) for t in (a, b, c))
    a, b, c = (t.reshape(-1, size, t.shape[2]) for t in (a, b, c))
    own = torch.bmm(a, b.transpose(1, 2))
    u = torch.bmm(own.triu_() if reverse else own.tril_(), c)
    if len(a) > heads:
        sums = torch.bmm(b.transpose(1, 2), c).unflatten(0, (heads, -1))
        past = torch.zeros_like(sums)
        if reverse:
            past[:, :-1] = sums[:, 1:].flip(1).cumsum(1).flip(1)
        else:
            past[:, 1:] = sums[:, :-1].cumsum(1)
        u.baddbmm_(a, past.flatten(0, 1))
    u = u.unflatten(0, (heads, -1)).flatten(1, 2)
    return u[:, :num_tokens]


def scan_gradients(a: Tensor, b: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b, c of `scan` (not reverse), `grad` being u's."""
    return scan(grad, c, b), scan(c, grad, a, reverse=True), scan(b, a, grad, reverse=True)


def sums_after(x: Tensor) -> Tensor:
    """Sum over j >= i of x_j [g, N, D]: what a cumsum over the tokens passes back."""
    return x.flip(1).cumsum(1).flip(1)
