"""A mask function over grid coordinates, compiled to blocks without ever holding all pairs of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_range, per_axis
from attnzoo.kernels.block_sparse_attention.orders import check_order
from attnzoo.kernels.block_sparse_attention.sparsity import (
    EMPTY,
    FULL,
    BlockSparsity,
    Ranges,
    block_sizes,
    cut,
    flags,
    unique_tiles,
)

PAIRS = 1 << 22  # pairs of tokens that are looked at at a time, or one row of blocks of one head


def _coordinates(name: str, grid: Sequence[int], dense: Ranges, device: Any) -> tuple[Tensor, Tensor]:
    """(coordinates [axes, N] int32, 0 for global tokens; which tokens are global, bool [N])."""
    if isinstance(grid, int) or not isinstance(grid, Sequence) or not grid:
        raise TypeError(f"{name}_grid must be a sequence of at least one axis length, got {grid!r}")
    grid = per_axis(f"{name}_grid", tuple(grid), len(grid), low=1)
    ranges = list(dense)
    inside = math.prod(grid)
    for entry in ranges:
        if not (isinstance(entry, Sequence) and len(entry) == 2 and all(type(end) is int for end in entry)):
            raise TypeError(
                f"dense_{'queries' if name == 'query' else 'keys'} must hold pairs (start, stop), got {entry!r}"
            )
    total = inside + sum(stop - start for start, stop in ranges)
    is_dense = flags("dense_queries" if name == "query" else "dense_keys", ranges, total)
    if int(is_dense.sum()) != total - inside:
        raise ValueError(f"dense ranges of the {name} side must not overlap, got {ranges}")
    places = torch.zeros(len(grid), total, dtype=torch.int32)
    places[:, ~is_dense] = torch.stack(torch.unravel_index(torch.arange(inside), grid)).int()
    return places.to(device), is_dense.to(device)


def from_function(
    function: Callable[..., Tensor],
    query_grid: Sequence[int],
    key_grid: Sequence[int] | None = None,
    block_size: int | Sequence[int] = 64,
    *,
    heads: int | None = None,
    dense_queries: Ranges = (),
    dense_keys: Ranges = (),
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> BlockSparsity:
    """The blocks of a mask function; blocks visible in part get a mask tile, equal tiles are kept once.

    function(query, key) -> bool, or function(query, key, head) where `heads` is given: query and key are tuples of
        integer tensors, one per axis of their grid, that broadcast to [heads, queries, keys], head is [heads, 1, 1];
        so must the result. E.g. `lambda q, k: (q[0] - k[0]).abs() + (q[1] - k[1]).abs() < 5`.
    query_grid, key_grid: lengths of the axes, row-major; key_grid None: the same, and then dense_keys and key_order
        that are not given are those of the queries.
    block_size: tokens of a block, one number or (queries, keys).
    dense_queries, dense_keys: ranges (start, stop) of tokens that stand in the sequence outside the grid (text): these
        queries see every key, these keys are seen by all. The grid's tokens fill the other places in order, so that
        num_queries = prod(query_grid) + lengths of the ranges.
    query_order, key_order: orders along which to cut, [N] or per head; they become the result's.
    device: where the function is evaluated and the result is.

    Every pair of tokens is looked at once, PAIRS at a time; what is held is 4 bytes per pair of blocks and the tiles.
    Raises TypeError, ValueError for arguments or a result of `function` that don't fit.
    """
    sizes = block_sizes(block_size)
    if key_grid is None:
        key_grid, dense_keys = query_grid, list(dense_keys) or (dense_queries := list(dense_queries))
        key_order = query_order if key_order is None else key_order
    query_at, query_dense = _coordinates("query", query_grid, dense_queries, device)
    key_at, key_dense = _coordinates("key", key_grid, dense_keys, device)
    num_queries, num_keys = query_at.shape[1], key_at.shape[1]
    orders = check_order("query_order", query_order, num_queries), check_order("key_order", key_order, num_keys)
    query_order, key_order = (order if order is None else order.to(device) for order in orders)
    if heads is not None:
        check_range("heads", heads, 1)
    per_head = [1 if order is None else len(order) for order in (query_order, key_order)]
    count = heads or max(per_head)
    if any(count % n for n in per_head):
        raise ValueError(f"heads must be a multiple of the orders' heads, got {count} heads and orders of {per_head}")

    (block_q, block_k), num_blocks = sizes, (cut(num_queries, sizes[0]), cut(num_keys, sizes[1]))
    table = torch.full((1, count, *num_blocks), EMPTY, dtype=torch.int32, device=device)
    found: list[Tensor] = []
    num_found = 0
    row = block_q * num_blocks[1] * block_k
    step_heads = max(1, min(count, PAIRS // row))
    step = max(1, min(num_blocks[0], PAIRS // (row * step_heads)))
    for first_head in range(0, count, step_heads):
        numbers = torch.arange(first_head, min(first_head + step_heads, count), device=device)
        key = _side(key_at, key_dense, key_order, numbers, count, 0, num_blocks[1], block_k)
        for first in range(0, num_blocks[0], step):
            last = min(first + step, num_blocks[0])
            query = _side(query_at, query_dense, query_order, numbers, count, first, last, block_q)
            arguments = ([at[..., :, None] for at in query[0]], [at[..., None, :] for at in key[0]])
            given = (tuple(arguments[0]), tuple(arguments[1]), *([numbers[:, None, None]] if heads else []))
            shape = len(numbers), (last - first) * block_q, num_blocks[1] * block_k
            seen = _evaluate(function, given, shape) | query[1][..., :, None] | key[1][..., None, :]
            seen = seen & query[2][:, None] & key[2][None, :]
            blocks = seen.expand(shape).reshape(len(numbers), last - first, block_q, num_blocks[1], block_k)
            visible = blocks.sum((2, 4), dtype=torch.int32)
            area = query[2].view(-1, block_q).sum(1)[:, None] * key[2].view(-1, block_k).sum(1)
            part = torch.where(visible == area, FULL, torch.where(visible > 0, 0, EMPTY))
            at = (part == 0).nonzero(as_tuple=True)
            tiles, number = unique_tiles(blocks[at[0], at[1], :, at[2]])
            part[at] = number + num_found
            table[0, first_head : first_head + len(numbers), first:last] = part.int()
            found.append(tiles)
            num_found += len(tiles)
    if bool((table == table[:, :1]).all()):  # the heads turned out to be alike
        table = table[:, :1]
    order = query_order, key_order
    return BlockSparsity.from_table(table, torch.cat(found), num_queries, num_keys, sizes, *order)


def _side(
    at: Tensor, dense: Tensor, order: Tensor | None, heads: Tensor, count: int, first: int, last: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks first .. last - 1 of one side: coordinates [axes, heads or 1, positions], global, within the end."""
    position = torch.arange(first * block, last * block, device=at.device)
    inside = position < at.shape[1]
    position = position.clamp(max=at.shape[1] - 1)
    token = position[None] if order is None else order[heads * len(order) // count][:, position].long()
    return at[:, token], dense[token], inside


def _evaluate(function: Callable[..., Tensor], arguments: tuple, shape: tuple[int, int, int]) -> Tensor:
    """What the function says, checked."""
    said = function(*arguments)
    if not isinstance(said, Tensor) or said.dtype != torch.bool:
        told = str(said.dtype).removeprefix("torch.") if isinstance(said, Tensor) else type(said).__name__
        raise TypeError(f"function must return a bool tensor, got {told}")
    try:
        fits = torch.broadcast_shapes(said.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"function must return what broadcasts to {shape}, got {tuple(said.shape)}")
    return said
