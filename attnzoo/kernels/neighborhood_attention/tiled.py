"""The CPU path: tiles of queries against the box of keys around them, by batched matrix products, forward and backward.

Per column of the last axis and group of batch entries or heads, keys and values are copied heads-first once (half types
become float32 there: half-precision products are tens of times slower on most CPUs), then cut into tiles by whole rows.
Memory beyond inputs and outputs is a few tiles' logits (_LOGITS elements at a time) and one column's keys, never tokens
x tokens. The backward pass computes the logits again from lse, whatever back end made them; a gradient that several
tiles share is summed in a fixed order. See `tiling.py` for the cut.

Where windows cut the grid into cells of tokens that attend among themselves (`tiling.cells`), no tile needs another's
keys: batch entries, some at a time, are copied cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.neighborhood_attention.tiling import Cells, Column, Plan, cells, plan

_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_SAFE = 60.0
_LOGITS = 1 << 18
_COLUMN = 1 << 23
_BIAS = 1 << 23


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all (the device is judged by `dispatch`)."""
    return []


@dataclass(frozen=True)
class _Unit:
    """What one pass works on: batch entries, key/value heads, and chunks of row tiles."""

    batch: slice
    heads: slice
    chunks: tuple[tuple[int, int], ...]


class _Buffers:
    """A problem, and memory for its intermediate results."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.group = problem.num_heads // problem.num_heads_kv
        self.dtype = problem.compute_dtype
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A buffer of this call, the same memory at every request of one name: fresh pages cost as much as the sums."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=self.dtype)
        return self._scratch[name][:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The batched matrix product in a scratch buffer."""
        return torch.bmm(left, right, out=self.scratch(name, *left.shape[:2], right.shape[2]))


class _Call(_Buffers):
    """A problem with its plan, and the tensors seen as [B, rows, columns, heads, ...]."""

    def __init__(self, problem: Problem, tile: tuple[int, ...] | None = None) -> None:
        super().__init__(problem)
        self.plan: Plan = plan(problem, tile)

    def rows(self, tensor: Tensor) -> Tensor:
        """A view of [B, *grid, heads, dim] as [B, *rows, columns, heads, dim], rows in the plan's order."""
        if self.problem.rank == 1:
            tensor = tensor.unsqueeze(2)
        for axis in range(len(self.plan.rows), 0, -1):
            shape = self.plan.rows[axis - 1].axis.row_shape(tensor.shape[axis])
            if len(shape) == 2:
                tensor = tensor.unflatten(axis, shape[::-1]).transpose(axis, axis + 1)
        return tensor

    def padded(self, tensor: Tensor) -> Tensor:
        """A key or value with the zero keys of border "zero" around it: one copy there, itself elsewhere."""
        if not any(self.plan.padding):
            return tensor
        padding = self.plan.padding[2:] if self.problem.rank == 1 else self.plan.padding
        return F.pad(tensor, (0, 0, 0, 0, *padding))

    def unpadded(self, tensor: Tensor) -> Tensor:
        """The view of `padded`'s result that its argument was."""
        for axis, size in enumerate(self.problem.grid):
            before = self.plan.padding[2 * (len(self.plan.key_grid) - 1 - axis)]
            tensor = tensor.narrow(1 + axis, before, size)
        return tensor

    def units(self) -> Iterator[_Unit]:
        """The passes over the grid, within the limits on memory; each goes through all the columns."""
        problem, cut = self.problem, self.plan
        num_tiles, widest = len(cut.query), max(problem.head_dim, problem.head_dim_v)
        pairs = max(column.num_queries * column.num_keys for column in cut.columns)
        per_tile = self.group * cut.query.shape[1] * cut.key.shape[1] * pairs
        per_head = math.prod(cut.key_grid[:-1]) * max(column.num_keys for column in cut.columns) * widest
        heads = max(1, min(problem.num_heads_kv, _LOGITS // per_tile, _COLUMN // per_head))
        tiles = max(1, min(num_tiles, _LOGITS // (per_tile * heads)))
        chunks = tuple((first, min(first + tiles, num_tiles)) for first in range(0, num_tiles, tiles))
        entries = 1
        if heads == problem.num_heads_kv and tiles == num_tiles:
            entries = max(1, min(_LOGITS // (per_tile * heads * tiles), _COLUMN // (per_head * heads)))
        for entry in range(0, problem.batch, entries):
            for head in range(0, problem.num_heads_kv, heads):
                yield _Unit(
                    slice(entry, min(entry + entries, problem.batch)),
                    slice(head, min(head + heads, problem.num_heads_kv)),
                    chunks,
                )

    def all_heads(self, unit: _Unit) -> slice:
        """The query heads of a unit."""
        return slice(unit.heads.start * self.group, unit.heads.stop * self.group)

    def heads_first(
        self, name: str, tensor: Tensor, unit: _Unit, columns: slice, heads: slice, scale: float = 1.0
    ) -> Tensor:
        """A column of [B, *rows, columns, heads, dim] as a contiguous [b, heads, rows, columns, dim], times scale."""
        part = tensor[unit.batch, ..., columns, heads, :].movedim(-2, 1)
        copy = self.scratch(name, *part.shape)
        copy.copy_(part)
        if scale != 1.0:
            copy.mul_(scale)
        return copy.flatten(2, -3)

    def query_tiles(self, name: str, rows: Tensor, first: int, last: int) -> Tensor:
        """[b, heads, rows, columns, dim] as [b, heads_kv, tiles, group, queries, dim], contiguous."""
        cut, (batch, heads, _, columns, dim) = self.plan, rows.shape
        per_tile = cut.query.shape[1]
        if cut.in_order:
            taken = rows.narrow(2, first * per_tile, (last - first) * per_tile)
        else:
            taken = self.scratch(name, batch, heads, (last - first) * per_tile, columns, dim)
            torch.index_select(rows, 2, cut.query[first:last].flatten(), out=taken)
        tiles = taken.reshape(batch, -1, self.group, last - first, per_tile * columns, dim)
        return tiles.transpose(2, 3).contiguous()

    def key_tiles(self, name: str, rows: Tensor, first: int, last: int) -> Tensor:
        """[b, heads_kv, rows, columns, dim] as [b * heads_kv * tiles, keys, dim], contiguous."""
        taken = rows
        if not self.plan.keys_in_order or last - first < len(self.plan.key):
            index = self.plan.key[first:last].flatten()
            taken = self.scratch(name, *rows.shape[:2], len(index), *rows.shape[3:])
            torch.index_select(rows, 2, index, out=taken)
        return taken.view(-1, self.plan.key.shape[1] * rows.shape[3], rows.shape[4])

    def put(
        self,
        name: str,
        tiles: Tensor,
        whole: Tensor,
        unit: _Unit,
        column: Column,
        chunk: tuple[int, int],
        add: bool = False,
    ) -> None:
        """Write (or add) tiles [b, heads_kv, tiles, group, queries, dim] into `whole` [B, *rows, columns, heads, dim].

        Where the chunk's rows are not a slice of `whole`, the unit's chunks wait in a buffer for the last one.
        """
        cut = self.plan
        per_tile = cut.query.shape[1]
        made = tiles.unflatten(4, (per_tile, column.num_queries)).permute(0, 2, 4, 5, 1, 3, 6).flatten(1, 2)
        goal = whole[unit.batch, ..., column.queries, self.all_heads(unit), :].unflatten(-2, (-1, self.group))
        row_shape = goal.shape[1:-4]
        begin, end = chunk[0] * per_tile, chunk[1] * per_tile
        if cut.in_order and len(row_shape) == 1:
            goal = goal[:, begin:end]
        elif not cut.in_order or made.shape[1] < cut.query.numel():
            waiting = self.scratch(name, goal.shape[0], cut.query.numel(), *goal.shape[-4:])
            waiting[:, begin:end].copy_(made)
            if chunk[1] < len(cut.query):
                return
            made = waiting if cut.in_order else waiting.index_select(1, cut.inverse)
        made = made.unflatten(1, goal.shape[1:-4])
        if add:
            goal.add_(made)
        else:
            goal.copy_(made)

    def put_keys(self, goal: Tensor, left: Tensor, right: Tensor, chunk: tuple[int, int]) -> None:
        """Add left @ right, a chunk's [b * heads_kv * tiles, keys, dim], to goal [b, heads_kv, rows, columns, dim].

        Where the chunk is all rows in order, goal is overwritten.
        """
        if self.plan.keys_in_order and chunk[1] - chunk[0] == len(self.plan.key):
            torch.bmm(left, right, out=goal.view(len(left), -1, goal.shape[-1]))
            return
        made = self.product("key tiles' gradient", left, right)
        goal.index_add_(
            2, self.plan.key[chunk[0] : chunk[1]].flatten(), made.view(*goal.shape[:2], -1, *goal.shape[3:])
        )


def _bias_tiles(call: _Call, bias: Tensor, unit: _Unit, column: Column, first: int, last: int) -> Tensor:
    """The bias of a chunk over log 2, [b or 1, heads_kv, tiles, group, queries, keys]."""
    cut, heads = call.plan, call.all_heads(unit)
    if call.problem.bias == "offset":
        table = bias.flatten(1)[heads].to(call.dtype) * _LOG2E
        taken = table[:, cut.offset(first, last, column)]
        return taken.unflatten(0, (-1, call.group)).transpose(1, 2)[None]
    of_batch = _Unit(unit.batch if bias.shape[0] > 1 else slice(0, 1), unit.heads, unit.chunks)
    rows = call.heads_first("bias", call.rows(bias), of_batch, column.queries, heads, _LOG2E)
    tiles = call.query_tiles("bias tiles", rows, first, last)
    slot = cut.slot(first, last, column)[None, None, :, None]
    return tiles.gather(-1, slot.expand(*tiles.shape[:2], -1, call.group, -1, -1))


def _logits(
    call: _Call, query: Tensor, keys: Tensor, added: Tensor | None, column: Column, first: int, last: int
) -> Tensor:
    """[b, heads_kv, tiles, group, queries, keys] over log 2; -inf where a query doesn't see a key.

    query and added hold the scale and 1 / log 2.
    """
    logits = call.product("logits", query.flatten(3, 4).flatten(0, 2), keys.transpose(1, 2))
    logits = logits.view(*query.shape[:-1], -1)
    if added is not None:
        logits += added
    mask = call.plan.mask(first, last, column)
    return logits if mask is None else logits.add_(mask[:, None])


class _BiasCache:
    """The bias of each chunk and kind of column, kept where it does not change from batch entry to batch entry."""

    def __init__(self, call: _Call, bias: Tensor | None) -> None:
        self.call, self.bias = call, bias
        self.kept: dict[tuple[int, int, int], Tensor] = {}
        self.size = 0

    def get(self, unit: _Unit, column: Column, first: int, last: int) -> Tensor | None:
        """The chunk's bias, or None where there is none."""
        if self.bias is None:
            return None
        if self.call.problem.bias == "query":
            return _bias_tiles(self.call, self.bias, unit, column, first, last)
        name = (first, unit.heads.start, column.kind)
        if name not in self.kept:
            made = _bias_tiles(self.call, self.bias, unit, column, first, last)
            if self.size + made.numel() > _BIAS:
                return made
            self.size += made.numel()
            self.kept[name] = made
        return self.kept[name]


def _additional(call: _Call, unit: _Unit, tensor: Tensor | None) -> Tensor | None:
    """Additional keys or values [B, n, heads_kv, dim] as [b * heads_kv, n, dim] for one unit."""
    if tensor is None or tensor.shape[1] == 0:
        return None
    return tensor[unit.batch, :, unit.heads].transpose(1, 2).to(call.dtype).flatten(0, 1)


def _by_head(tiles: Tensor) -> Tensor:
    """[b, heads_kv, tiles, group, queries, x] as [b * heads_kv, all queries, x]."""
    return tiles.flatten(2, 4).flatten(0, 1)


def _bounded(call: _Buffers, query: Tensor, key: Tensor, bias: Tensor | None, additional_keys: Tensor | None) -> bool:
    """Whether lengths alone show every logit to be within 2 ** +-_SAFE, so that the softmax needs no maximum."""
    if query.numel() == 0 or call.problem.bias == "query":
        return False

    def longest(tensor: Tensor) -> float:
        return float(torch.linalg.vector_norm(tensor, dim=-1, dtype=call.dtype).amax())

    keys = longest(key)
    if additional_keys is not None and additional_keys.numel():
        keys = max(keys, longest(additional_keys))
    bound = abs(call.problem.scale) * longest(query) * keys
    if bias is not None:
        bound += float(bias.masked_fill(bias == -math.inf, 0.0).abs().amax())
    return bound * _LOG2E <= _SAFE


def _highest(weights: Tensor, far: Tensor | None) -> Tensor:
    """Each row's largest logit, 0 for a row without keys."""
    highest = weights.amax(-1, keepdim=True)
    if far is not None:
        highest = torch.maximum(highest, far.amax(-1, keepdim=True))
    return highest.masked_fill_(highest == -math.inf, 0.0)


def _powers(logits: Tensor, shift: Tensor | None) -> Tensor:
    """2 ** (logits - shift), in place."""
    return (logits if shift is None else logits.sub_(shift)).exp2_()


def _cells(problem: Problem) -> Cells | None:
    """The cells, where `problem`'s windows are some and a cell's logits may be held at once."""
    if problem.bias == "query" or problem.num_additional:
        return None
    cut = cells(problem)
    group = problem.num_heads // problem.num_heads_kv
    return None if cut is None or group * cut.size**2 > _LOGITS else cut


class _CellCall(_Buffers):
    """A problem whose windows are cells. A cell of one key/value head is one matrix product, its query heads stacked:
    query [cells * heads_kv, group * tokens, head_dim], key [cells * heads_kv, tokens, head_dim].
    """

    def __init__(self, problem: Problem, cut: Cells) -> None:
        super().__init__(problem)
        self.cut = cut

    def units(self) -> Iterator[tuple[slice, slice, slice]]:
        """Batch entries, query heads and key/value heads of each pass, within the limits on memory."""
        problem = self.problem
        per_head = problem.num_tokens * max(problem.head_dim, problem.head_dim_v) * self.group
        pairs = self.group * self.cut.size**2
        heads = max(1, min(problem.num_heads_kv, _LOGITS // pairs, _COLUMN // per_head))
        entries = max(1, min(_LOGITS // (self.cut.count * pairs * heads), _COLUMN // (per_head * heads)))
        for entry in range(0, problem.batch, entries):
            for head in range(0, problem.num_heads_kv, heads):
                last = min(head + heads, problem.num_heads_kv)
                yield slice(entry, entry + entries), slice(head * self.group, last * self.group), slice(head, last)

    def parts(self, size: int, heads_kv: slice) -> Iterator[slice]:
        """A unit's `size` matrices by whole cells, as many as their logits may be held at once."""
        heads = heads_kv.stop - heads_kv.start
        held = max(1, _LOGITS // (self.group * self.cut.size**2 * heads)) * heads
        return (slice(first, first + held) for first in range(0, size, held))

    def copy(self, name: str, tensor: Tensor, batch: slice, heads: slice, stacked: int = 1) -> Tensor:
        """Part of [B, *grid, heads, dim] as a contiguous [cells * heads / stacked, stacked * tokens, dim]."""
        part = self.cut.view(tensor[batch, ..., heads, :])
        # whole tokens first, then heads: a cell's far reads are then as few as its tokens
        head_axis = -2 - self.problem.rank
        whole = part.movedim(head_axis, -2)
        tokens = self.scratch("tokens", *whole.shape).copy_(whole)
        copy = self.scratch(name, *part.shape).copy_(tokens.movedim(-2, head_axis))
        return copy.view(-1, stacked * self.cut.size, part.shape[-1])

    def put(self, made: Tensor, whole: Tensor, batch: slice, heads: slice) -> None:
        """Write what has `copy`'s shape into [B, *grid, heads, dim]."""
        goal = self.cut.view(whole[batch, ..., heads, :])
        goal.copy_(made.view(goal.shape))

    def logits(self, query: Tensor, key: Tensor, table: Tensor | None, heads: slice) -> Tensor:
        """[matrices, queries, keys] over log 2."""
        logits = self.scratch("logits", len(query), query.shape[1], self.cut.size)
        torch.baddbmm(logits, query, key.transpose(1, 2), beta=0, alpha=self.problem.scale * _LOG2E, out=logits)
        if table is not None:
            self.by_head(logits, heads).add_(table[heads])
        return logits

    def by_head(self, logits: Tensor, heads: slice) -> Tensor:
        """Logits as [cells, heads, tokens, tokens]."""
        return logits.view(-1, heads.stop - heads.start, self.cut.size, self.cut.size)

    def table(self, bias: Tensor | None) -> Tensor | None:
        """The bias over log 2, [heads, tokens, tokens], the same in every cell."""
        return None if bias is None else bias.flatten(1).to(self.dtype)[:, self.cut.offset] * _LOG2E

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """Fill out and lse."""
        table, bounded = self.table(bias), _bounded(self, query, key, bias, None)
        for batch, heads, heads_kv in self.units():
            queries = self.copy("query", query, batch, heads, self.group)
            keys, values = self.copy("key", key, batch, heads_kv), self.copy("value", value, batch, heads_kv)
            made = self.scratch("out", *queries.shape[:2], values.shape[2])
            statistics = self.scratch("lse", *queries.shape[:2], 1)
            for part in self.parts(len(queries), heads_kv):
                weights = self.logits(queries[part], keys[part], table, heads)
                highest = None if bounded else _highest(weights, None)
                weights = _powers(weights, highest)
                total = weights.sum(-1, keepdim=True)
                goal = torch.bmm(weights, values[part], out=made[part])
                log_total = total.log2() if highest is None else total.log2().add_(highest)
                torch.mul(log_total, _LN2, out=statistics[part])
                # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
                goal.div_(total if bias is None else total.masked_fill_(total == 0.0, 1.0))
            self.put(made, out, batch, heads)
            self.put(statistics, lse[..., None], batch, heads)

    def backward(
        self, grad_out: Tensor, statistics: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        """What the function `backward` returns; statistics [B, *grid, heads, 2] are lse / log 2 and delta."""
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
        table, scale = self.table(bias), self.problem.scale
        grad_table = None if table is None else torch.zeros_like(table)
        for batch, heads, heads_kv in self.units():
            queries = self.copy("query", query, batch, heads, self.group)
            given = self.copy("grad", grad_out, batch, heads, self.group)
            keys, values = self.copy("key", key, batch, heads_kv), self.copy("value", value, batch, heads_kv)
            log_total, shift = self.copy("statistics", statistics, batch, heads, self.group).split(1, -1)
            d_query, d_key, d_value = (
                self.scratch(f"d_{name}", *t.shape) for name, t in zip("qkv", (queries, keys, values))
            )
            for part in self.parts(len(queries), heads_kv):
                weights = self.logits(queries[part], keys[part], table, heads).sub_(log_total[part]).exp2_()
                torch.bmm(weights.transpose(1, 2), given[part], out=d_value[part])
                d_logits = self.product("d_logits", given[part], values[part].transpose(1, 2))
                d_logits.sub_(shift[part]).mul_(weights)
                if grad_table is not None:
                    grad_table[heads] += self.by_head(d_logits, heads).sum(0)
                for goal, left, right in ((d_query, d_logits, keys), (d_key, d_logits.transpose(1, 2), queries)):
                    torch.baddbmm(goal[part], left, right[part], beta=0, alpha=scale, out=goal[part])
            self.put(d_query, grads[0], batch, heads)
            self.put(d_key, grads[1], batch, heads_kv)
            self.put(d_value, grads[2], batch, heads_kv)
        grad_bias = None
        if bias is not None and grad_table is not None:
            total = torch.zeros(bias.shape, dtype=self.dtype)
            total.flatten(1).index_add_(1, self.cut.offset.flatten(), grad_table.flatten(1))
            grad_bias = total.to(bias.dtype)
        return grads[0], grads[1], grads[2], grad_bias, None, None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    problem: Problem,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, *grid, heads, head_dim_v] in the query's dtype and lse [B, *grid, heads] in the computation's."""
    out = query.new_empty(*query.shape[:-1], problem.head_dim_v)
    lse = query.new_empty(query.shape[:-1], dtype=problem.compute_dtype)
    cut = _cells(problem) if tile is None else None
    if cut is not None:
        _CellCall(problem, cut).forward(query, key, value, bias, out, lse)
        return out, lse
    call = _Call(problem, tile)
    rows, keys, values = call.rows(query), call.rows(call.padded(key)), call.rows(call.padded(value))
    out_rows, lse_rows = call.rows(out), call.rows(lse[..., None])
    added, bounded = _BiasCache(call, bias), _bounded(call, query, key, bias, additional_keys)
    for unit in call.units():
        heads = call.all_heads(unit)
        for column in call.plan.columns:
            column_query = call.heads_first("query", rows, unit, column.queries, heads, problem.scale * _LOG2E)
            column_key = call.heads_first("key", keys, unit, column.keys, unit.heads)
            column_value = call.heads_first("value", values, unit, column.keys, unit.heads)
            far_key, far_value = (_additional(call, unit, t) for t in (additional_keys, additional_values))
            for first, last in unit.chunks:
                tiles = call.query_tiles("query tiles", column_query, first, last)
                tile_keys = call.key_tiles("key tiles", column_key, first, last)
                weights = _logits(call, tiles, tile_keys, added.get(unit, column, first, last), column, first, last)
                far = None
                if far_key is not None:
                    far = call.product("far", _by_head(tiles), far_key.transpose(1, 2)).view(*tiles.shape[:-1], -1)
                highest = None if bounded else _highest(weights, far)
                weights = _powers(weights, highest)
                total = weights.sum(-1, keepdim=True)
                tile_values = call.key_tiles("value tiles", column_value, first, last)
                made = call.product("out tiles", weights.flatten(3, 4).flatten(0, 2), tile_values)
                made = made.view(*tiles.shape[:-1], -1)
                if far is not None and far_value is not None:
                    far = _powers(far, highest)
                    total += far.sum(-1, keepdim=True)
                    made += torch.bmm(_by_head(far), far_value).view_as(made)
                # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
                log_total = total.log2() if highest is None else total.log2().add_(highest)
                call.put("lse", log_total.mul_(_LN2), lse_rows, unit, column, (first, last))
                made.div_(total if bias is None else total.masked_fill_(total == 0.0, 1.0))
                call.put("out", made, out_rows, unit, column, (first, last))
    return out, lse


class _BiasGradient:
    """Sums the logits' gradients into the bias's."""

    def __init__(self, call: _Call, bias: Tensor) -> None:
        self.call, self.bias = call, bias
        self.total = torch.zeros(bias.shape, dtype=call.dtype)
        self.sums: dict[tuple[int, int, int, int], tuple[_Unit, Column, Tensor]] = {}

    def add(self, grad: Tensor, unit: _Unit, column: Column, first: int, last: int) -> None:
        """grad: [b, heads_kv, tiles, group, queries, keys], zero for repeated queries."""
        if self.call.problem.bias == "query":
            self._by_query(grad, unit, column, first, last)
            return
        summed, name = grad.sum(0), (first, last, unit.heads.start, column.kind)
        if name in self.sums:
            self.sums[name][2].add_(summed)
        else:
            self.sums[name] = (unit, column, summed)
        if sum(kept.numel() for _, _, kept in self.sums.values()) > _BIAS:
            self.flush()

    def flush(self) -> None:
        """Empty the sums into the table; the columns of one kind share its offsets."""
        table = self.total.flatten(1)
        for (first, last, _, _), (unit, column, summed) in self.sums.items():
            index = self.call.plan.offset(first, last, column).flatten()
            by_head = summed.transpose(1, 2).flatten(0, 1).flatten(1)
            for head, weights in zip(range(*self.call.all_heads(unit).indices(table.shape[0])), by_head):
                table[head] += torch.bincount(index, weights.double(), table.shape[1]).to(table.dtype)
        self.sums.clear()

    def _by_query(self, grad: Tensor, unit: _Unit, column: Column, first: int, last: int) -> None:
        call = self.call
        place, present = (t[None, None, :, None] for t in call.plan.place(first, last, column))
        taken = grad.gather(-1, place.expand(*grad.shape[:2], -1, call.group, -1, -1)) * present
        if self.bias.shape[0] == 1:
            taken, unit = taken.sum(0, keepdim=True), _Unit(slice(0, 1), unit.heads, unit.chunks)
        call.put("grad_bias", taken, call.rows(self.total), unit, column, (first, last), add=True)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, value, bias, additional_keys and additional_values.

    With p = exp(logits - lse): dp = <grad_out, value>, dlogits = p * (dp - <grad_out, out> + grad_lse).
    """
    dtype = problem.compute_dtype
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse[..., None].to(dtype)
    total = lse.to(dtype)[..., None] * _LOG2E
    if bias is not None:
        total = total.masked_fill(total == -math.inf, 0.0)
    statistics = torch.cat([total, delta], -1)
    cells_cut = _cells(problem) if tile is None else None
    if cells_cut is not None:
        return _CellCall(problem, cells_cut).backward(grad_out, statistics, query, key, value, bias)
    call = _Call(problem, tile)
    cut, statistics = call.plan, call.rows(statistics)
    padded_key, padded_value = call.padded(key), call.padded(value)
    rows, grads, keys, values = (call.rows(t) for t in (query, grad_out, padded_key, padded_value))
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_query_rows = call.rows(grad_query)
    fresh = torch.empty if cut.disjoint else torch.zeros
    grad_key, grad_value = (fresh(t.shape, dtype=dtype) for t in (padded_key, padded_value))
    grad_keys, grad_values = call.rows(grad_key), call.rows(grad_value)
    added = _BiasCache(call, bias)
    grad_bias = None if bias is None else _BiasGradient(call, bias)
    grad_far_key, grad_far_value = (
        None if t is None else torch.zeros(t.shape, dtype=dtype) for t in (additional_keys, additional_values)
    )
    for unit in call.units():
        heads = call.all_heads(unit)
        for column in cut.columns:
            column_query = call.heads_first("query", rows, unit, column.queries, heads, problem.scale * _LOG2E)
            column_grad = call.heads_first("grad", grads, unit, column.queries, heads)
            column_statistics = call.heads_first("statistics", statistics, unit, column.queries, heads)
            column_key = call.heads_first("key", keys, unit, column.keys, unit.heads)
            column_value = call.heads_first("value", values, unit, column.keys, unit.heads)
            d_key = call.scratch("d_key", *column_key.shape).zero_()
            d_value = call.scratch("d_value", *column_value.shape).zero_()
            far_key, far_value = (_additional(call, unit, t) for t in (additional_keys, additional_values))
            for first, last in unit.chunks:
                tiles = call.query_tiles("query tiles", column_query, first, last)
                grad = call.query_tiles("grad tiles", column_grad, first, last)
                log_total, shift = call.query_tiles("statistic tiles", column_statistics, first, last).unbind(-1)
                log_total, shift = log_total[..., None], shift[..., None]
                if not cut.in_order:  # repeated queries have no gradient
                    keep = cut.valid[first:last, None, :, None].expand(-1, -1, -1, column.num_queries).flatten(2)
                    grad = grad.mul_(keep[..., None])
                    shift = shift * keep[..., None]
                tile_keys = call.key_tiles("key tiles", column_key, first, last)
                tile_values = call.key_tiles("value tiles", column_value, first, last)
                flat_query, flat_grad = (t.flatten(3, 4).flatten(0, 2) for t in (tiles, grad))
                weights = _logits(call, tiles, tile_keys, added.get(unit, column, first, last), column, first, last)
                weights.sub_(log_total).exp2_()
                flat_weights = weights.flatten(3, 4).flatten(0, 2)
                call.put_keys(d_value, flat_weights.transpose(1, 2), flat_grad, (first, last))
                d_logits = call.product("d_logits", flat_grad, tile_values.transpose(1, 2)).view_as(weights)
                d_logits.sub_(shift).mul_(weights)
                if grad_bias is not None:
                    grad_bias.add(d_logits, unit, column, first, last)
                flat = d_logits.flatten(3, 4).flatten(0, 2)
                d_query = call.product("d_query", flat, tile_keys).view_as(tiles)
                call.put_keys(d_key, flat.transpose(1, 2), flat_query, (first, last))
                if far_key is not None and far_value is not None:
                    assert grad_far_key is not None and grad_far_value is not None
                    far_query, far_grad = _by_head(tiles), _by_head(grad)
                    far = call.product("far", far_query, far_key.transpose(1, 2)).sub_(_by_head(log_total)).exp2_()
                    d_far_value = torch.bmm(far.transpose(1, 2), far_grad)
                    d_far = call.product("d_far", far_grad, far_value.transpose(1, 2)).sub_(_by_head(shift)).mul_(far)
                    d_query += torch.bmm(d_far, far_key).view_as(d_query)
                    d_far_key = torch.bmm(d_far.transpose(1, 2), far_query).mul_(_LN2)
                    for goal, part in ((grad_far_key, d_far_key), (grad_far_value, d_far_value)):
                        shape = (unit.batch.stop - unit.batch.start, -1, *part.shape[1:])
                        goal[unit.batch, :, unit.heads] += part.view(shape).transpose(1, 2)
                call.put("grad_query", d_query.mul_(problem.scale), grad_query_rows, unit, column, (first, last))
            for goal, part in ((grad_keys, d_key.mul_(_LN2)), (grad_values, d_value)):
                goal = goal[unit.batch, ..., column.keys, unit.heads, :]
                part = part.movedim(1, -2).unflatten(1, goal.shape[1:-3])
                if cut.disjoint:
                    goal.copy_(part)
                else:
                    goal.add_(part)
    if grad_bias is not None:
        grad_bias.flush()
    return (
        grad_query,
        call.unpadded(grad_key).to(key.dtype).contiguous(),
        call.unpadded(grad_value).to(value.dtype).contiguous(),
        None if grad_bias is None or bias is None else grad_bias.total.to(bias.dtype),
        None if grad_far_key is None or additional_keys is None else grad_far_key.to(additional_keys.dtype),
        None if grad_far_value is None or additional_values is None else grad_far_value.to(additional_values.dtype),
    )
