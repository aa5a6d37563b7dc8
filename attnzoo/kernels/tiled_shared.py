"""What the CPU paths of operations share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers of one dtype, for one call: fresh pages cost as much as the sums that are made in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous buffer of `shape`, the same memory at every request of one name; what it holds is left over."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = torch.empty(size, dtype=self.dtype)
        return self._kept[name][:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The batched matrix product in a buffer."""
        return torch.bmm(left, right, out=self.take(name, *left.shape[:2], right.shape[2]))


_SAFE = 40.0  # e ** +-40: the sum of any number of such weights, and each of them, is well within float32


def bounded(scale: float, query: Tensor, key: Tensor, highest: float) -> bool:
    """Whether lengths alone show every logit to be so small that the softmax needs no maximum.

    query, key: [..., head_dim], whichever are paired. highest: what is added to a logit is at most that, in size.
    """
    if not highest <= _SAFE:
        return False
    longest = [float(torch.linalg.vector_norm(tensor, dim=-1).amax()) for tensor in (query, key)]
    return abs(scale) * longest[0] * longest[1] + highest <= _SAFE
