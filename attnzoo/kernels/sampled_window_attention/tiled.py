"""The CPU path: keys and values are read by one fused gather, and windows go through in chunks that stay in the cache.

Key and value are packed side by side into rows [head_dim + head_dim_v] of a table, an item of the batch (or several
small ones) at a time, with a border of zeros around each map, so that no corner needs a mask. A reading is then the sum
of four weighted rows, which is what F.embedding_bag does in one pass; its transpose, the gradient, is a sum of weighted
sampled gradients per row, embedding_bag again with the readings sorted by row: no atomics, the same bits in every run.

Memory beside the results, in elements of the computation's dtype: the table, the group's queries and outputs, _LOGITS
logits and their chunk's sampled keys and values (of one window at least); in the backward pass also the gradients of the
group's sampled keys and values, and 5 numbers per reading and corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.sampled_window_attention import bilinear
from attnzoo.kernels.sampled_window_attention.problem import Problem
from attnzoo.kernels.scratch import Scratch

_LOGITS = 1 << 18  # logits at once: 1 MB, and the buffers of a chunk together fit a core's cache
_TABLE = 1 << 19  # elements of a table that several small items share


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all."""
    return []


class _Group:
    """Some items of a call: their windows [items * windows, heads, area, dim], and the table of their keys and values.

    A map of height x width is (height + 3) x (width + 2) cells of heads_kv rows in the table, itself at (1, 1), and one
    cell more: the corners of every place in -1 .. size lie in it, some of them in the next line's first cell, a zero.
    """

    def __init__(self, problem: Problem, first: int, last: int, scratch: Scratch) -> None:
        self.problem, self.items, self.scratch = problem, slice(first, last), scratch
        self.num_items, self.num_units = last - first, (last - first) * problem.num_windows
        height, width = problem.key_grid
        self.padded = (height + 3, width + 2)
        self.rows_per_item = cells(problem) * problem.num_heads_kv
        self.num_rows = self.num_items * self.rows_per_item
        readings = 4 * self.num_units * problem.num_heads * problem.num_samples
        self.integer = torch.int32 if max(self.num_rows, readings) < 2**31 else torch.int64
        heads, line = problem.num_heads_kv, self.padded[1] * problem.num_heads_kv
        self.to_corner = torch.tensor([0, heads, line, line + heads], dtype=self.integer)
        origin = torch.arange(self.num_items, dtype=self.integer).repeat_interleave(problem.num_windows)
        head = torch.arange(problem.num_heads, dtype=self.integer) // problem.group
        self.origin = (origin * self.rows_per_item + line + heads)[:, None, None] + head[:, None]

    def table(self, key: Tensor, value: Tensor) -> Tensor:
        """The rows [num_rows, head_dim + head_dim_v]."""
        p = self.problem
        rows = self.scratch.take("table", self.num_rows, p.head_dim + p.head_dim_v)
        by_item = rows.view(self.num_items, self.rows_per_item, -1)
        by_item[:, -p.num_heads_kv :] = 0.0
        maps = by_item[:, : -p.num_heads_kv].view(self.num_items, *self.padded, p.num_heads_kv, -1)
        maps[:, :1], maps[:, -2:], maps[:, :, :1], maps[:, :, -1:] = 0.0, 0.0, 0.0, 0.0
        inner = maps[:, 1:-2, 1:-1]
        inner[..., : p.head_dim].copy_(key[self.items])
        inner[..., p.head_dim :].copy_(value[self.items])
        return rows

    def unpack(self, rows: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        """Write the inside of a table's rows to this group's items of key and of value."""
        p = self.problem
        by_item = rows.view(self.num_items, self.rows_per_item, -1)[:, : -p.num_heads_kv]
        inner = by_item.view(self.num_items, *self.padded, p.num_heads_kv, -1)[:, 1:-2, 1:-1]
        if key is not None:
            key[self.items] = inner[..., : p.head_dim]
        if value is not None:
            value[self.items] = inner[..., p.head_dim :]

    def windows(self, name: str, tensor: Tensor, scale: float = 1.0) -> Tensor:
        """This group of [B, H, W, heads, dim] as [units, heads, area, dim], a copy times scale."""
        cut = self.problem.cut(tensor[self.items])
        copy = self.scratch.take(name, *cut.shape)
        copy.copy_(cut)
        if scale != 1.0:
            copy.mul_(scale)
        return copy.view(self.num_units, self.problem.num_heads, self.problem.area, -1)

    def put(self, made: Tensor, whole: Tensor) -> None:
        """The inverse of `windows`."""
        goal = self.problem.cut(whole[self.items])
        goal.copy_(made.view(goal.shape))

    def places(self, positions: Tensor) -> Tensor:
        """This group's positions as [2, units, heads, K], a copy."""
        planes = positions[self.items].movedim(-1, 0)
        copy = self.scratch.take("places", *planes.shape)
        return copy.copy_(planes).view(2, self.num_units, self.problem.num_heads, -1)

    def chunks(self) -> Iterator[slice]:
        """Ranges of units."""
        p = self.problem
        step = max(1, _LOGITS // (p.num_heads * p.area * p.num_samples))
        for first in range(0, self.num_units, step):
            yield slice(first, min(first + step, self.num_units))

    def row_blocks(self) -> list[slice]:
        """Ranges of a window's queries: one range of all, but where a single window has too many logits."""
        p = self.problem
        step = max(1, _LOGITS // (p.num_heads * p.num_samples))
        return [slice(first, min(first + step, p.area)) for first in range(0, p.area, step)]

    def locate(self, places: Tensor, units: slice) -> tuple[Tensor, Tensor]:
        """The rows [readings, 4] of the table that a chunk reads, and its fractions [2, units, heads, K]."""
        low, part = bilinear.corners(places[:, units], self.problem.key_grid)
        down, across = low.to(self.integer)
        row = down.mul_(self.padded[1]).add_(across).mul_(self.problem.num_heads_kv).add_(self.origin[units])
        return (row[..., None] + self.to_corner).view(-1, 4), part

    def read(self, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Sampled keys and values [units * heads, K, head_dim + head_dim_v]."""
        taken = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights.view(-1, 4))
        return taken.view(-1, self.problem.num_samples, table.shape[1])

    def logits(self, queries: Tensor, keys: Tensor, bias: Tensor | None, block: slice) -> Tensor:
        """[units * heads, rows, K] of queries [units * heads, rows, head_dim], already scaled, in a buffer."""
        if bias is None:
            return self.scratch.product("logits", queries, keys.transpose(1, 2))
        made = self.scratch.take("logits", *queries.shape[:2], keys.shape[1])
        made.view(-1, self.problem.num_heads, *made.shape[1:]).copy_(bias[:, block])
        return torch.baddbmm(made, queries, keys.transpose(1, 2), out=made)


def cells(problem: Problem) -> int:
    """Cells of one padded map in a table."""
    return (problem.key_grid[0] + 3) * (problem.key_grid[1] + 2) + 1


def _groups(problem: Problem) -> Iterator[_Group]:
    """All items, as many at a time as share a table."""
    per_item = cells(problem) * problem.num_heads_kv * (problem.head_dim + problem.head_dim_v)
    step, scratch = max(1, _TABLE // per_item), Scratch(problem.compute_dtype)
    for first in range(0, problem.batch, step):
        yield _Group(problem, first, min(first + step, problem.batch), scratch)


def _flat(windows: Tensor, units: slice, block: slice) -> Tensor:
    """[units, heads, area, dim] as [units * heads, rows, dim] of a chunk."""
    return windows[units, :, block].flatten(0, 1)


def forward(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """out [B, H, W, heads, head_dim_v] in the query's dtype and lse [B, H, W, heads] in the computation's."""
    dtype, dim = problem.compute_dtype, problem.head_dim
    out = query.new_empty((*query.shape[:4], problem.head_dim_v))
    lse = query.new_empty(query.shape[:4], dtype=dtype)
    added = None if bias is None else bias.to(dtype)
    for group in _groups(problem):
        table, places = group.table(key, value), group.places(positions)
        queries = group.windows("query", query, problem.scale)
        made = group.scratch.take("out", *queries.shape[:3], problem.head_dim_v)
        totals = group.scratch.take("lse", *queries.shape[:3], 1)
        blocks = group.row_blocks()
        for units in group.chunks():
            rows, part = group.locate(places, units)
            taken = group.read(table, rows, bilinear.weights(part))
            for block in blocks:
                weights = group.logits(_flat(queries, units, block), taken[..., :dim], added, block)
                highest = weights.amax(-1, keepdim=True)
                if bias is not None:
                    highest.masked_fill_(highest == -math.inf, 0.0)
                total = weights.sub_(highest).exp_().sum(-1, keepdim=True)
                product = group.scratch.product("product", weights, taken[..., dim:])
                # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
                product.div_(total if bias is None else total.masked_fill(total == 0.0, 1.0))
                made[units, :, block] = product.view(-1, problem.num_heads, *product.shape[1:])
                total.log_().add_(highest)
                totals[units, :, block] = total.view(-1, problem.num_heads, *total.shape[1:])
        group.put(made, out)
        group.put(totals, lse)
    return out, lse


def _spread(group: _Group, rows: Tensor, weights: Tensor, gradients: Tensor) -> Tensor:
    """The transpose of `read`: [num_rows, dim], what all readings [n, 4] of gradients [n, dim] give to each row."""
    ordered, order = rows.flatten().sort(stable=True)
    count = torch.bincount(ordered, minlength=group.num_rows)
    starts = (count.cumsum(0) - count).to(group.integer)
    return F.embedding_bag(
        order.to(group.integer) // 4, gradients, starts, mode="sum", per_sample_weights=weights.flatten()[order]
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of query, key, value, positions and bias, None where `needs` has no use for one.

    The formulas are the reference's.
    """
    dtype, dim, width = problem.compute_dtype, problem.head_dim, problem.head_dim + problem.head_dim_v
    given = (query, key, value, positions, bias)
    found = [t.new_empty(t.shape) if t is not None and needed else None for t, needed in zip(given, needs)]
    grad_query, grad_key, grad_value, grad_positions, _ = found
    sampled, heads = any(needs[1:4]), problem.num_heads
    added = None if bias is None else bias.to(dtype)
    grad_bias = None if added is None or not needs[4] else torch.zeros_like(added)
    shift = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift.sub_(grad_lse[..., None])
    # a query without keys has weights exp(logit - inf) = 0
    total = lse if bias is None else lse.masked_fill(lse == -math.inf, math.inf)
    for group in _groups(problem):
        table, places, take = group.table(key, value), group.places(positions), group.scratch.take
        queries, grads = group.windows("query", query, problem.scale), group.windows("grad_out", grad_out)
        totals, shifts = group.windows("lse", total[..., None]), group.windows("shift", shift)
        d_queries = take("d_query", *queries.shape) if needs[0] else None
        readings = (group.num_units, heads, problem.num_samples)
        d_taken = take("d_taken", *readings, width) if sampled else None
        d_places = take("d_places", 2, *readings) if needs[3] else None
        all_rows, all_weights = [], []
        for units in group.chunks():
            rows, part = group.locate(places, units)
            weights = bilinear.weights(part)
            taken = group.read(table, rows, weights)
            blocks = group.row_blocks()
            for block in blocks:
                flat = _flat(queries, units, block)
                p = group.logits(flat, taken[..., :dim], added, block)
                p.sub_(_flat(totals, units, block)).exp_()
                given_rows = _flat(grads, units, block)
                d_logits = group.scratch.product("d_logits", given_rows, taken[..., dim:].transpose(1, 2))
                d_logits.sub_(_flat(shifts, units, block)).mul_(p)
                if grad_bias is not None:
                    grad_bias[:, block] += d_logits.view(-1, heads, *d_logits.shape[1:]).sum(0)
                if d_queries is not None:
                    made = group.scratch.product("product", d_logits, taken[..., :dim]).mul_(problem.scale)
                    d_queries[units, :, block] = made.view(-1, heads, *made.shape[1:])
                if d_taken is None:
                    continue
                for columns, left, right in ((slice(dim), d_logits, flat), (slice(dim, width), p, given_rows)):
                    made = group.scratch.product("product", left.transpose(1, 2), right)
                    goal = d_taken[units, ..., columns]
                    made = made.view(goal.shape)
                    if block.start:
                        goal.add_(made)
                    else:
                        goal.copy_(made)
            if d_places is not None and d_taken is not None:
                own = d_taken[units].flatten(0, 1)
                for axis, slope in enumerate(bilinear.slopes(part)):
                    d_places[axis, units] = group.read(table, rows, slope).mul_(own).sum(-1).view(-1, *readings[1:])
            if needs[1] or needs[2]:
                all_rows.append(rows)
                all_weights.append(weights.view(-1, 4))
        if d_queries is not None and grad_query is not None:
            group.put(d_queries, grad_query)
        if d_places is not None and grad_positions is not None:
            goal = grad_positions[group.items]
            goal.copy_(d_places.movedim(0, -1).view(goal.shape))
        if d_taken is not None and all_rows:
            spread = _spread(group, torch.cat(all_rows), torch.cat(all_weights), d_taken.view(-1, width))
            group.unpack(spread, grad_key, grad_value)
    return [*found[:4], None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)]
