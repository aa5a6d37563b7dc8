"""Which keys a generalized-neighborhood window shows to each query: exact counts and masks, for reports and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from attnzoo.errors import check_range, per_axis
from attnzoo.kernels.neighborhood_attention.problem import axis_windows
from attnzoo.kernels.planning import axis_pairs


def axis_table(size: int, kernel_size: int, stride: int, dilation: int, is_causal: bool) -> Tensor:
    """bool [size, size], True where query (row) sees key (column) along one axis.

    The rule and its source: attnzoo/kernels/neighborhood_attention/problem.py, border "shift".
    """
    own = axis_windows(size, kernel_size, stride, dilation, is_causal, "shift")
    place = own.position[None, :]
    seen = (place >= own.low[:, None]) & (place <= own.high[:, None])
    return seen & (own.group[:, None] == own.group[None, :])


def _axes(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
) -> list[tuple[int, int, int, int, bool]]:
    """One checked (size, kernel_size, stride, dilation, is_causal) per axis."""
    check_range("len(grid)", len(grid), 1, 3)
    rank = len(grid)
    axes = list(
        zip(
            per_axis("grid", grid, rank, low=1),
            per_axis("kernel_size", kernel_size, rank, low=1),
            per_axis("stride", stride, rank, low=1),
            per_axis("dilation", dilation, rank, low=1),
            per_axis("is_causal", is_causal, rank, kind=bool),
        )
    )
    for size, kernel, step, spread, _ in axes:
        if step > kernel:
            raise ValueError(f"stride must be at most kernel_size on every axis, got {stride} for {kernel_size}")
        if kernel * spread > size:
            raise ValueError(
                f"kernel_size * dilation must be at most the grid's size on every axis, got {kernel} * {spread} "
                f"for a size of {size}"
            )
    return axes


def window_mask(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """bool [N, N], True where query (row) sees key (column); tokens row-major over `grid`, N = prod(grid).

    Raises ValueError where a window does not fit, or N exceeds 16384 (the mask is for looking at, not for computing).
    """
    tables = [axis_table(*axis) for axis in _axes(grid, kernel_size, stride, dilation, is_causal)]
    check_range("prod(grid)", math.prod(grid), 1, 16384)
    mask = tables[0]
    for table in tables[1:]:
        size = mask.shape[0] * table.shape[0]
        mask = (mask[:, None, :, None] & table[None, :, None, :]).reshape(size, size)
    return mask


def density(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> float:
    """Mean number of keys that a query of `grid` sees, divided by all keys: exact, by counting per axis.

    Raises ValueError where a window does not fit the grid (kernel_size * dilation > size, stride > kernel_size).
    """
    share = 1.0
    for axis in _axes(grid, kernel_size, stride, dilation, is_causal):
        share *= axis_pairs(*axis) / axis[0] ** 2
    return share
