"""Prefix sums of outer products, u_i = sum over j <= i of (a_i . b_j) c_j, without a matrix of all pairs.

The tokens are cut into chunks of C: within a chunk the C x C products under the diagonal, before it the running sum of
b^T c. With C at least as wide as a head, the running sums of all chunks take no more room than c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
TRIANGLE = 32


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
        u.baddbmm_(a, _before(sums, reverse).flatten(0, 1))
    u = u.unflatten(0, (heads, -1)).flatten(1, 2)
    return u[:, :num_tokens]


def scan_gradients(a: Tensor, b: Tensor, c: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b, c of `scan` (not reverse), `grad` being u's."""
    return scan(grad, c, b), scan(c, grad, a, reverse=True), scan(b, a, grad, reverse=True)


def _before(sums: Tensor, reverse: bool) -> Tensor:
    """Sum over the chunks before each (reverse: after each) of sums [g, chunks, ...]."""
    past, count = torch.zeros_like(sums), sums.shape[1]
    if sums.device.type != "cpu":
        if reverse:
            past[:, :-1] = sums[:, 1:].flip(1).cumsum(1).flip(1)
        else:
            past[:, 1:] = sums[:, :-1].cumsum(1)
        return past
    # torch's cumsum on a CPU takes the entries one by one
    order = range(count - 2, -1, -1) if reverse else range(1, count)
    for i in order:
        last = i + 1 if reverse else i - 1
        torch.add(past[:, last], sums[:, last], out=past[:, i])
    return past


def running_sums(x: Tensor, reverse: bool = False) -> Tensor:
    """Sum over j <= i of x_j [g, N, D], as products with a triangle of ones; reverse: over j >= i."""
    heads, num_tokens, width = x.shape
    size = min(num_tokens, TRIANGLE)
    missing = -num_tokens % size
    x = (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(-1, size, width)
    ones = x.new_ones((size, size))
    inside = torch.bmm((ones.triu_() if reverse else ones.tril_()).expand(len(x), -1, -1), x)
    inside = inside.unflatten(0, (heads, -1))
    if len(x) > heads:
        inside += _before(inside[:, :, :1] if reverse else inside[:, :, -1:], reverse)
    return inside.flatten(1, 2)[:, :num_tokens]
