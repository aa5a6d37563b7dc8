"""The CPU path: keys and values are read by one fused gather, and windows go through in chunks that stay in the cache.

Key and value maps are rows [Hk * Wk * heads_kv, dim], as they lie in memory or, where their strides or dtype don't let
them, in a copy, an item of the batch (or several small ones) at a time. A reading is a sum of four weighted rows, which
is what F.embedding_bag does in one pass; its transpose, the gradient, is a sum of weighted sampled gradients per row,
embedding_bag again with the readings sorted by row: the same bits in every run. A corner outside the map is some row
inside it with the weight 0: where a key or value is not finite, and 0 times it no zero, the reference serves the call.

Memory beside the results, in elements of the computation's dtype: that copy; a chunk's queries, outputs, sampled keys
and values and at most _LOGITS logits (a row of one window where that is more); in the backward pass also the gradients
of all sampled keys and values of the items, and those of their maps, and some numbers per reading and corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.sampled_window_attention import bilinear, reference
from attnzoo.kernels.sampled_window_attention.problem import Problem
from attnzoo.kernels.tiled_shared import Scratch, bounded

_LOGITS = 1 << 19  # logits at once: 2 MB
_MAPS = 1 << 18  # elements of the key maps that several small items may have to go through together


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all."""
    return []


class _Chunk(NamedTuple):
    """Some windows: whole items, or rows of windows of one item, or some windows of one row."""

    items: slice
    down: slice
    across: slice


class _Located(NamedTuple):
    """Where a chunk reads: rows of the maps [readings, 4], and the corners of each axis."""

    rows: Tensor
    down: bilinear.Axis
    across: bilinear.Axis


class _Group:
    """Some items of a call; windows are [windows, heads, area, dim], sampled keys [windows * heads, K, dim]."""

    def __init__(self, problem: Problem, items: slice, scratch: Scratch) -> None:
        self.problem, self.items, self.scratch = problem, items, scratch
        num_items, item_rows = items.stop - items.start, math.prod(problem.key_grid) * problem.num_heads_kv
        self.num_rows = num_items * item_rows
        self.num_readings = num_items * problem.num_windows * problem.num_heads * problem.num_samples
        self.integer = torch.int32 if max(self.num_rows, 4 * self.num_readings) < 2**31 else torch.int64
        # indices are made as floating-point numbers, which hold these whole ones exactly, and converted at last
        exact = 2**24 if problem.compute_dtype == torch.float32 else 2**53
        self.number = problem.compute_dtype if self.num_rows < exact else torch.float64
        origin = torch.arange(num_items, dtype=self.number) * item_rows
        head = torch.arange(problem.num_heads) // problem.group
        self.origin = origin[:, None, None, None, None] + head[:, None]

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """This group's maps of [B, Hk, Wk, heads_kv, dim] as [num_rows, dim]: itself, or a copy in a buffer."""
        part = tensor[self.items]
        if part.dtype != self.scratch.dtype or not part.is_contiguous():
            part = self.scratch.take(name, *part.shape).copy_(part)
        return part.view(self.num_rows, part.shape[-1])

    def chunks(self) -> Iterator[_Chunk]:
        """All windows of the group, in order."""
        p, (down, across) = self.problem, self.problem.windows
        windows = max(1, _LOGITS // (p.num_heads * p.area * p.num_samples))
        steps = (max(1, windows // p.num_windows), max(1, windows // across), windows)
        for items in _ranges(self.items.start, self.items.stop, steps[0]):
            for rows in _ranges(0, down, steps[1]):
                for columns in _ranges(0, across, steps[2]):
                    yield _Chunk(items, rows, columns)

    def view(self, tensor: Tensor, chunk: _Chunk) -> Tensor:
        """A chunk of [B, H, W, heads, dim] as a view [items, down, across, heads, window height, width, dim]."""
        height, width = self.problem.window_size
        down = slice(chunk.down.start * height, chunk.down.stop * height)
        across = slice(chunk.across.start * width, chunk.across.stop * width)
        return self.problem.cut(tensor[chunk.items, down, across])

    def windows(self, name: str, tensor: Tensor, chunk: _Chunk) -> Tensor:
        """A chunk of [B, H, W, heads, dim] as [windows, heads, area, dim], in a buffer."""
        view = self.view(tensor, chunk)
        copy = self.scratch.take(name, *view.shape).copy_(view)
        return copy.view(-1, self.problem.num_heads, self.problem.area, view.shape[-1])

    def locate(self, positions: Tensor, chunk: _Chunk) -> _Located:
        """What a chunk reads."""
        p = self.problem
        places = positions[chunk].to(self.scratch.dtype)
        down, across = (bilinear.axis(along, size) for along, size in zip(places.unbind(-1), p.key_grid))
        origin = self.origin[chunk.items.start - self.items.start : chunk.items.stop - self.items.start]

        def rows(pixels: bilinear.Pair, step: int, first: Tensor | int) -> bilinear.Pair:
            one, other = (pixel.to(self.number).mul(step).add_(first) for pixel in pixels)
            return one, other

        lines = rows(down.pixel, p.key_grid[1] * p.num_heads_kv, origin)
        row = bilinear.corners(lines, rows(across.pixel, p.num_heads_kv, 0), torch.add)
        return _Located(row.to(self.integer).view(-1, 4), down, across)

    def read(self, maps: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Sampled rows [windows * heads, K, dim] of maps [num_rows, dim] by weights [..., 4]."""
        taken = F.embedding_bag(rows, maps, mode="sum", per_sample_weights=weights.view(-1, 4))
        return taken.view(-1, self.problem.num_samples, maps.shape[1])

    def spread(self, rows: Tensor, weights: Tensor, gradients: list[Tensor | None]) -> list[Tensor | None]:
        """The transpose of `read`: what readings [n, 4] of gradients [n, dim] give to each row, [num_rows, dim]."""
        rows = rows.masked_fill(weights == 0.0, self.num_rows)  # outside: a gradient that is not finite stays away
        ordered, order = rows.flatten().sort(stable=True)
        count = torch.bincount(ordered, minlength=self.num_rows + 1)
        starts = (count.cumsum(0) - count).to(self.integer)
        taken, source = weights.flatten()[order], order.to(self.integer) >> 2
        return [
            None if g is None else F.embedding_bag(source, g, starts, mode="sum", per_sample_weights=taken)[:-1]
            for g in gradients
        ]

    def blocks(self) -> list[slice]:
        """Ranges of a window's queries: one range of all, but where a single window has too many logits."""
        p = self.problem
        return list(_ranges(0, p.area, max(1, _LOGITS // (p.num_heads * p.num_samples))))

    def logits(self, queries: Tensor, keys: Tensor, bias: Tensor | None, block: slice) -> Tensor:
        """[windows * heads, rows, K] of queries [windows * heads, rows, head_dim], in a buffer."""
        made = self.scratch.take("logits", *queries.shape[:2], keys.shape[1])
        if bias is not None:
            made.view(-1, self.problem.num_heads, *made.shape[1:]).copy_(bias[:, block])
        beta, alpha = int(bias is not None), self.problem.scale
        return torch.baddbmm(made, queries, keys.transpose(1, 2), beta=beta, alpha=alpha, out=made)


def _ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def _groups(problem: Problem) -> Iterator[_Group]:
    """All items, one at a time or several small ones together."""
    per_item = math.prod(problem.key_grid) * problem.num_heads_kv * problem.head_dim
    scratch = Scratch(problem.compute_dtype)
    for items in _ranges(0, problem.batch, max(1, _MAPS // per_item)):
        yield _Group(problem, items, scratch)


def _finite(*tensors: Tensor) -> bool:
    """Whether the tensors are; at worst no, for finite ones with a sum that is not."""
    return all(
        math.isfinite(t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)) for t in tensors
    )


def _set(windows: Tensor, block: slice, made: Tensor) -> None:
    """Write [windows * heads, rows, dim] to [windows, heads, area, dim]."""
    windows[:, :, block] = made.view(-1, windows.shape[1], *made.shape[1:])


def forward(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, bias: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor]:
    """out [B, H, W, heads, head_dim_v] in the query's dtype and lse [B, H, W, heads] in the computation's."""
    if not _finite(key, value):
        return reference.forward(query, key, value, positions, bias, problem)
    dtype = problem.compute_dtype
    out = query.new_empty((*query.shape[:4], problem.head_dim_v))
    lse = query.new_empty((*query.shape[:4], 1), dtype=dtype)
    added = None if bias is None else bias.to(dtype)
    lowest, highest = (0.0, 0.0) if added is None else (float(end) for end in added.aminmax())
    holes = lowest == -math.inf  # then a query may be without keys
    for group in _groups(problem):
        key_rows, value_rows, blocks = group.rows("key", key), group.rows("value", value), group.blocks()
        for chunk in group.chunks():
            queries, at = group.windows("query", query, chunk), group.locate(positions, chunk)
            by_corner = bilinear.weights(at.down, at.across)
            keys, values = (group.read(maps, at.rows, by_corner) for maps in (key_rows, value_rows))
            made = group.scratch.take("out", *queries.shape[:3], problem.head_dim_v)
            totals, tops = (group.scratch.take(name, *queries.shape[:3], 1) for name in ("total", "top"))
            small = bounded(problem.scale, queries, keys, max(abs(lowest), abs(highest)))
            for block in blocks:
                weights = group.logits(queries[:, :, block].flatten(0, 1), keys, added, block)
                if not small:
                    top = weights.amax(-1, keepdim=True)
                    if holes:
                        top.masked_fill_(top == -math.inf, 0.0)
                    weights.sub_(top)
                    _set(tops, block, top)
                weights.exp_()
                _set(totals, block, weights.sum(-1, keepdim=True))
                if len(blocks) == 1:
                    torch.bmm(weights, values, out=made.flatten(0, 1))
                else:
                    _set(made, block, group.scratch.product("product", weights, values))
            goal = group.view(out, chunk)
            # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
            divisor = totals.masked_fill(totals == 0.0, 1.0) if holes else totals
            torch.div(made.view(goal.shape), divisor.view(*goal.shape[:-1], 1), out=goal)
            goal = group.view(lse, chunk)
            logs = totals.log_() if small else totals.log_().add_(tops)
            goal.copy_(logs.view(goal.shape))
    return out, lse.squeeze(-1)


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
    if not _finite(key, value):
        return reference.backward(grad_out, grad_lse, query, key, value, positions, bias, out, lse, problem, needs)
    dtype, heads = problem.compute_dtype, problem.num_heads
    given = (query, key, value, positions, bias)
    found = [t.new_empty(t.shape) if t is not None and needed else None for t, needed in zip(given, needs)]
    grad_query, grad_key, grad_value, grad_positions, _ = found
    added = None if bias is None else bias.to(dtype)
    grad_bias = None if added is None or not needs[4] else torch.zeros_like(added)
    shift = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        shift.sub_(grad_lse[..., None])
    # a query without keys has weights exp(logit - inf) = 0
    total = (lse if bias is None else lse.masked_fill(lse == -math.inf, math.inf))[..., None]
    for group in _groups(problem):
        key_rows, value_rows, blocks = group.rows("key", key), group.rows("value", value), group.blocks()
        located: list[tuple[Tensor, Tensor]] = []
        d_keys, d_values = (
            group.scratch.take(name, group.num_readings, dim) if needed or needs[3] else None
            for name, dim, needed in (("d_key", problem.head_dim, needs[1]), ("d_value", problem.head_dim_v, needs[2]))
        )
        done = 0
        for chunk in group.chunks():
            queries, grads = group.windows("query", query, chunk), group.windows("grad_out", grad_out, chunk)
            totals, shifts = group.windows("total", total, chunk), group.windows("shift", shift, chunk)
            at = group.locate(positions, chunk)
            by_corner = bilinear.weights(at.down, at.across)
            keys, values = (group.read(maps, at.rows, by_corner) for maps in (key_rows, value_rows))
            d_queries = group.scratch.take("d_query", *queries.shape)
            own, done = slice(done, done + len(at.rows)), done + len(at.rows)
            d_chunk = [None if d is None else d[own].view(t.shape) for d, t in ((d_keys, keys), (d_values, values))]
            for block in blocks:
                rows, given_rows, row_totals, row_shifts = (
                    t[:, :, block].flatten(0, 1) for t in (queries, grads, totals, shifts)
                )
                p = group.logits(rows, keys, added, block).sub_(row_totals).exp_()
                d_logits = group.scratch.product("d_logits", given_rows, values.transpose(1, 2))
                d_logits.sub_(row_shifts).mul_(p)
                if grad_bias is not None:
                    grad_bias[:, block] += d_logits.view(-1, heads, *d_logits.shape[1:]).sum(0)
                if len(blocks) == 1:
                    torch.bmm(d_logits, keys, out=d_queries.flatten(0, 1))
                elif grad_query is not None:
                    _set(d_queries, block, group.scratch.product("product", d_logits, keys))
                for d, left, right, factor in (
                    (d_chunk[0], d_logits, rows, problem.scale),
                    (d_chunk[1], p, given_rows, 1),
                ):
                    if d is not None:
                        torch.baddbmm(d, left.transpose(1, 2), right, beta=int(block.start > 0), alpha=factor, out=d)
            if grad_query is not None:
                goal = group.view(grad_query, chunk)
                torch.mul(d_queries.view(goal.shape), problem.scale, out=goal)
            if grad_positions is not None:
                goal = grad_positions[chunk]
                for axis, slope in enumerate(bilinear.slopes(at.down, at.across)):
                    by_keys, by_values = (
                        group.read(maps, at.rows, slope).mul_(d).sum(-1)
                        for maps, d in zip((key_rows, value_rows), d_chunk)
                        if d is not None
                    )
                    goal[..., axis] = by_keys.add_(by_values).view(goal.shape[:-1])
            if needs[1] or needs[2]:
                located.append((at.rows, by_corner.view(-1, 4)))
        if located:
            all_rows, all_weights = (torch.cat(parts) for parts in zip(*located))
            gradients = [d if needed else None for d, needed in zip((d_keys, d_values), needs[1:3])]
            for whole, spread in zip((grad_key, grad_value), group.spread(all_rows, all_weights, gradients)):
                if whole is not None and spread is not None:
                    whole[group.items] = spread.view(-1, *whole.shape[1:])
    return [*found[:4], None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)]
