"""Orders of tokens: which token stands at each position of the sequence that is cut into blocks.

An order is a permutation, [N] or one per head [heads, N]: position p holds token order[p]. Blocks of a reordered
sequence hold other tokens than blocks of the sequence as it is, which is the point of it (PAROAttention: an order of
the axes frame, height, width per head makes the attention map block-wise sparse). The kernels read rows through the
order, so that nothing is permuted in memory, and write results where the token itself stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_tensor, per_axis


def _grid(grid: Sequence[int]) -> tuple[int, ...]:
    if isinstance(grid, int) or not isinstance(grid, Sequence) or not grid:
        raise TypeError(f"grid must be a sequence of at least one axis length, got {grid!r}")
    return per_axis("grid", tuple(grid), len(grid), low=1)


def _between(inner: Tensor, num_before: int, num_after: int) -> Tensor:
    """`inner` moved up, with tokens that keep their places before and after it."""
    check_range("num_before", num_before, 0)
    check_range("num_after", num_after, 0)
    inside = num_before + len(inner)
    return torch.cat([torch.arange(num_before), inner + num_before, torch.arange(inside, inside + num_after)])


def axis_order(grid: Sequence[int], axes: Sequence[int], num_before: int = 0, num_after: int = 0) -> Tensor:
    """The order that walks a row-major grid with its axes taken as `axes`, the last one fastest: int64 [N].

    grid: lengths of the axes, e.g. (frames, height, width). axes: a permutation of 0 .. rank - 1; (0, 1, 2) changes
    nothing, (1, 2, 0) puts the frames of one place side by side. PAROAttention chooses one of the six per head.
    num_before, num_after: tokens that stand before and after the grid (text) and keep their places; N counts them.
    Raises TypeError, ValueError for arguments that don't fit.
    """
    grid = _grid(grid)
    axes = per_axis("axes", tuple(axes), len(grid))
    if sorted(axes) != list(range(len(grid))):
        raise ValueError(f"axes must be a permutation of 0 to {len(grid) - 1}, got {axes}")
    return _between(torch.arange(math.prod(grid)).view(grid).permute(axes).flatten(), num_before, num_after)


def tile_order(grid: Sequence[int], tile: int | Sequence[int], num_before: int = 0, num_after: int = 0) -> Tensor:
    """The order that walks a row-major grid tile by tile, row-major in and among the tiles: int64 [N].

    tile: lengths of a tile, one for all axes or one per axis; tiles at the far ends are cut off where it does not
    divide. Blocks of prod(tile) tokens are tiles where it divides every axis. num_before, num_after as in `axis_order`.
    Raises TypeError, ValueError for arguments that don't fit.
    """
    grid = _grid(grid)
    shape = per_axis("tile", tile, len(grid), low=1)
    number = inner = torch.zeros(math.prod(grid), dtype=torch.int64)
    for n, t, at in zip(grid, shape, torch.unravel_index(torch.arange(math.prod(grid)), grid)):
        number = number * -(-n // t) + at // t
        inner = inner * t + at % t
    return _between(torch.argsort(number * math.prod(shape) + inner), num_before, num_after)


def check_order(name: str, order: Tensor | None, num_tokens: int) -> Tensor | None:
    """An order as int32 [heads or 1, N]; raises TypeError or ValueError unless every row is a permutation.

    Reading the values waits for the device; in a graph under torch.compile they can't be read, and aren't.
    """
    if order is None:
        return None
    check_tensor(name, order, dtypes=[torch.int32, torch.int64])
    if order.ndim not in (1, 2) or order.shape[-1] != num_tokens or order.shape[0] == 0:
        raise ValueError(f"{name} must be [N={num_tokens}] or [heads, N={num_tokens}], got {tuple(order.shape)}")
    rows = order.view(-1, num_tokens)
    if not torch.compiler.is_compiling() and order.device.type != "meta":
        ordered = torch.arange(num_tokens, device=order.device, dtype=order.dtype)
        if not bool((rows.sort(-1).values == ordered).all()):
            raise ValueError(f"{name} must hold every number from 0 to {num_tokens - 1} once in a row")
    return rows.to(torch.int32).contiguous()


def in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """[B, heads, N, ...] with position p of head h holding row order[h, p]; order [heads or a divisor, N] or None."""
    if order is None:
        return tensor
    if order.shape[0] == 1:
        return tensor.index_select(2, order[0])
    rows = order.long().repeat_interleave(tensor.shape[1] // order.shape[0], 0)
    rows = rows.view(1, *rows.shape, *(1,) * (tensor.ndim - 3))
    return tensor.gather(2, rows.expand(tensor.shape))


def inverse(order: Tensor | None) -> Tensor | None:
    """The order that undoes an order [heads or 1, N]."""
    return None if order is None else order.argsort(-1)
