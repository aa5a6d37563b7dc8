"""What is asked of neighborhood attention, as one immutable value that every back end reads.

Per axis of length n, with dilation d, coordinate c lies in group c % d at position p = c // d; the group has
L = ceil((n - c % d) / d) members. Queries of one stride group share the window of their leader:

    not causal   leader = min((p // s) * s + s // 2, L - 1);  keys centre - K // 2 .. centre + (K - 1) // 2
                 border "shift":        centre = clamp(leader, K // 2, L - 1 - (K - 1) // 2)
                 border "mask", "zero": centre = leader; keys outside 0 .. L - 1 drop out, or stay as zero vectors
    causal       leader = min((p // s) * s + s - 1, L - 1);   keys j with 0 <= j <= p and leader - j < K (the window
                 shrinks, whatever the border)

A window has K slots per axis: slot 0 is the key at centre - K // 2 (not causal) or at leader - K + 1 (causal). A
per-query bias is indexed by slot (row-major over the axes), an offset bias by key position - query position + K - 1,
which stays within 0 .. 2K - 2 because stride <= kernel_size. A zero vector still gets its bias.
Axes combine by AND. Source: NATTEN 8c8729f, backends/flex.py; "mask" and "zero" follow shared/DESIGN.md, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class AxisWindows:
    """One axis's windows, an entry per coordinate of the axis (int64, on CPU).

    group, position: the coordinate's dilation group and its place there; start: the position of the window's slot 0;
    low, high: the first and last position that take part (beyond the group's length only for border "zero");
    length: members of the coordinate's group.
    """

    group: Tensor
    position: Tensor
    start: Tensor
    low: Tensor
    high: Tensor
    length: Tensor


@lru_cache(maxsize=256)
def axis_windows(size: int, kernel_size: int, stride: int, dilation: int, is_causal: bool, border: str) -> AxisWindows:
    """The windows of an axis of `size` coordinates; see the module's text for the rule. Don't change the result."""
    coordinate = torch.arange(size)
    group, position = coordinate % dilation, coordinate // dilation
    length = (size - group + dilation - 1) // dilation
    lead = stride - 1 if is_causal else stride // 2
    leader = torch.minimum(position // stride * stride + lead, length - 1)
    if is_causal:
        start = leader - kernel_size + 1
        return AxisWindows(group, position, start, start.clamp(min=0), position, length)
    before, after = kernel_size // 2, (kernel_size - 1) // 2
    if border == "shift":
        leader = torch.minimum(leader.clamp(min=before), length - 1 - after)
    start, high = leader - before, leader + after
    if border == "mask":
        return AxisWindows(group, position, start, start.clamp(min=0), torch.minimum(high, length - 1), length)
    return AxisWindows(group, position, start, start, high, length)


@dataclass(frozen=True)
class Problem:
    """One call: geometry, border rule, and what kinds of tensors came with it.

    grid, kernel_size, stride, dilation, is_causal have one entry per axis (1 to 3 axes).
    bias: "none" | "offset" ([heads, *(2 * kernel_size - 1)], indexed by key - query in dilated units, plus K - 1)
    | "query" ([B or 1, *grid, heads, prod(kernel_size)], window positions row-major).
    num_additional: extra keys/values that every query also sees, in the same softmax.
    requires_grad, device_type, return_lse: whether a backward pass will follow, where, and whether lse was asked for;
        only `reasons` functions read them.
    """

    batch: int
    grid: tuple[int, ...]
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float
    border: str
    bias: str
    num_additional: int
    dtype: torch.dtype
    requires_grad: bool = False
    device_type: str = "cpu"
    return_lse: bool = False

    @property
    def rank(self) -> int:
        """Number of grid axes."""
        return len(self.grid)

    @property
    def num_tokens(self) -> int:
        """Queries per head and batch entry."""
        return math.prod(self.grid)

    @property
    def num_slots(self) -> int:
        """Keys in a full window."""
        return math.prod(self.kernel_size)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of softmax statistics, and of lse: float32, or float64 where the inputs are float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def windows(self, axis: int) -> AxisWindows:
        """The windows along one axis."""
        return axis_windows(
            self.grid[axis],
            self.kernel_size[axis],
            self.stride[axis],
            self.dilation[axis],
            self.is_causal[axis],
            self.border,
        )
