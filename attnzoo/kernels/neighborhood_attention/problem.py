"""What is asked of neighborhood attention, as one immutable value that every back end reads.

Per axis of length n, with dilation d, coordinate c lies in group c % d at position p = c // d; the group has
L = ceil((n - c % d) / d) members. Queries of one stride group share the window of their leader:

    not causal   leader = min((p // s) * s + s // 2, L - 1);  keys centre - K // 2 .. centre + (K - 1) // 2
                 border "shift":        centre = clamp(leader, K // 2, L - 1 - (K - 1) // 2)
                 border "mask", "zero": centre = leader; keys outside 0 .. L - 1 drop out, or stay as zero vectors
    causal       leader = min((p // s) * s + s - 1, L - 1);   keys j with j <= p and leader - j < K (the window shrinks)

Axes combine by AND. Source: NATTEN 8c8729f, backends/flex.py; "mask" and "zero" follow shared/DESIGN.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """One call: geometry, border rule, and what kinds of tensors came with it.

    grid, kernel_size, stride, dilation, is_causal have one entry per axis (1 to 3 axes).
    bias: "none" | "offset" ([heads, *(2 * kernel_size - 1)], indexed by key - query in dilated units, plus K - 1)
    | "query" ([B or 1, *grid, heads, prod(kernel_size)], window positions row-major).
    num_additional: extra keys/values that every query also sees, in the same softmax.
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

    @property
    def rank(self) -> int:
        """Number of grid axes."""
        return len(self.grid)
