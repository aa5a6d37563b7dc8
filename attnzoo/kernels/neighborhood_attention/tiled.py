"""The CPU path: tiles of queries against the box of keys around them, by batched matrix products, forward and backward.

Queries, keys and values are copied into tiles and strips of boxes (see `tiling.py` for the cut; half types become
float32 there: half-precision products are tens of times slower on most CPUs), as many at a time as give CHUNK pairs of
query and key, so that copies and logits stay in the cache. Logits are made transposed, [keys, queries] per tile: the
products then read rows as they lie, and reorder the few queries of a tile rather than its many keys. Memory beyond
inputs and outputs is those copies and logits, never tokens x tokens.

At first weights are exp(logit) times a table (0 where a query doesn't see a key, else exp(bias)), without a maximum;
exp and not exp2, which PyTorch's CPU computes up to five times slower, nor exp of -inf, which is slower still.
Where every denominator turns out to be within e ** +-_SAFE that is as exact as with one, and it takes half the passes
over the logits. Where one is not (or a key or value is not finite), or with a bias that is large or by query, the
weights are 2 ** (logit - maximum), with masks and bias added to the logits. The backward pass has the same two ways; it
computes the logits again from lse, whatever back end made them. A gradient that several tiles share is summed in a
fixed order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention import tiling
from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.neighborhood_attention.tiling import Plan, Region, plan

_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_SAFE = 40.0  # of lse: a weight that is lost at exp(-87) is then below every result's rounding
_BIASES = (-_SAFE, 20.0)  # so that exp(bias) and what it multiplies lose nothing either
_BIAS = 1 << 23  # elements of bias tables that a call keeps
_WORKSPACE = 1 << 22  # elements that a thread keeps from call to call (times `_sharing`), and
_VIEWS = 1 << 12  # how many views of them

_kept = threading.local()


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all (the device is judged by `dispatch`)."""
    return []


@dataclass(frozen=True)
class _Unit:
    """What is copied together: batch entries, key heads, and groups and inner tiles."""

    batch: slice
    heads: slice
    region: Region

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Batch entries and key heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @cached_property
    def matrices(self) -> int:
        """Batch entries times key heads."""
        return math.prod(self.shape)

    @cached_property
    def place(self) -> tuple[int, tuple[int, int]]:
        """All but where it begins among batch entries and heads."""
        return self.region.number, self.shape

    @cached_property
    def groups(self) -> int:
        """Dilation groups."""
        return math.prod(self.region.shape[: len(self.region.groups)])

    @cached_property
    def strips(self) -> int:
        """Strips, of all batch entries and heads."""
        return self.matrices * math.prod(self.region.shape)


def _sharing() -> int:
    """How many times CHUNK pairs are worked on at a time: several threads share them, and each wants enough."""
    return min(torch.get_num_threads(), 4)


class _Memory:
    """Buffers that a thread keeps from call to call, and views of them: both cost as much as the sums to make anew."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple, Any] = {}

    def buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """At least `size` elements, the same memory at every request of one name."""
        kept = self.buffers.get((name, dtype))
        if kept is None or kept.numel() < size:
            self.views.clear()
            self.buffers[name, dtype] = kept = torch.empty(size, dtype=dtype)
        return kept

    def trim(self) -> None:
        """Give back what is beyond the limits."""
        if sum(buffer.numel() for buffer in self.buffers.values()) > _WORKSPACE * _sharing():
            self.buffers.clear()
            self.views.clear()
        if len(self.views) > _VIEWS:
            self.views.clear()


class _Call:
    """A problem with its plan, and memory for its intermediate results."""

    def __init__(self, problem: Problem, tile: tuple[int, ...] | None, separate: bool) -> None:
        self.problem = problem
        self.plan: Plan = plan(problem, tile, separate)
        self.repeats = problem.num_heads // problem.num_heads_kv
        self.dtype = problem.compute_dtype
        self.name = (self.plan.number, self.repeats, self.dtype)  # in the names of views
        self.rows = self.plan.queries * self.repeats  # of a tile's logits, once per query head
        self.chunk = tiling.CHUNK * _sharing()  # pairs worked on at a time
        self._tables: dict[tuple, Tensor] = {}
        if not hasattr(_kept, "memory"):
            _kept.memory = _Memory()
        self.memory: _Memory = _kept.memory

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A buffer, the same memory at every request of one name."""
        key = (name, self.dtype, shape)
        view = self.memory.views.get(key)
        if view is None:
            size = math.prod(shape)
            view = self.memory.buffer(name, size, self.dtype)[:size].view(shape)
            self.memory.views[key] = view
        return view

    def product(self, name: str, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """scale times the batched matrix product, in a scratch buffer."""
        made = self.scratch(name, *left.shape[:2], right.shape[2])
        return torch.baddbmm(made, left, right, beta=0, alpha=scale, out=made)

    # -- the passes over the grid

    def units(self) -> Iterator[_Unit]:
        """The passes, of about `chunk` pairs where strips are not longer than that."""
        cut, problem = self.plan, self.problem
        most = self.chunk // (cut.loop.count * cut.keys * self.rows)
        strips = math.prod(cut.groups) * math.prod(tiles.count for tiles in cut.inner)
        heads = max(1, min(problem.num_heads_kv, most))
        heads = -(-problem.num_heads_kv // -(-problem.num_heads_kv // heads))  # units of one size
        entries = max(1, most // (strips * heads))
        for entry in range(0, problem.batch, entries):
            for head in range(0, problem.num_heads_kv, heads):
                for region in cut.regions(max(1, most // heads)):
                    batch = slice(entry, min(entry + entries, problem.batch))
                    yield _Unit(batch, slice(head, min(head + heads, problem.num_heads_kv)), region)

    def chunks(self, unit: _Unit) -> list[slice]:
        """A unit's tiles in ranges whose logits may be held at once: all of them, or some of one strip."""
        tiles, pairs = unit.strips * self.plan.loop.count, self.plan.keys * self.rows
        if unit.strips > 1 or tiles * pairs <= 2 * self.chunk:
            return [slice(0, tiles)]
        step = max(1, self.chunk // pairs)
        return [slice(at, min(at + step, tiles)) for at in range(0, tiles, step)]

    # -- copies

    def _copied(self, name: str, tensor: Tensor, unit: _Unit, queries: bool) -> tuple[list, Tensor, tuple[Tensor, ...]]:
        """(moves, the copy, what of it is to be filled first) for `copy`."""
        cut, dim, strips = self.plan, tensor.shape[-1], unit.strips
        lead = (*unit.shape, self.repeats if queries else 1)
        what = "queries" if queries else "keys"
        moves, complete = cut.moves(what, unit.region, lead, tensor.stride(), dim)
        fill: tuple[Tensor, ...]
        if queries:
            inside = result = self.scratch(name, strips * cut.loop.count, self.rows, dim)
            fill = () if complete else (inside,)
        else:
            before, size, after = (rows * cut.row * dim for rows in (cut.margin[0], strips * cut.strip, cut.margin[1]))
            whole = self.scratch(name, before + size + after)
            inside = whole[before : before + size]
            # what is read beyond both ends counts for nothing, but must be finite
            fill = (whole[:before], whole[before + size :]) if complete else (whole,)
            step = cut.loop.tile * cut.row * dim
            start = whole.storage_offset() + before + cut.loop.first[0] * cut.row * dim
            result = whole.as_strided((strips * cut.loop.count, cut.keys, dim), (step, dim, 1), start)
        made = [(move.of_copy(inside), move.sizes, move.strides, move.offset) for move in moves]
        return made, result, tuple(part for part in fill if part.numel())

    def copy(self, name: str, tensor: Tensor, unit: _Unit, queries: bool, filler: float = 0.0) -> Tensor:
        """A unit's part of [B, *grid, heads, dim] as tiles of queries or as boxes of keys.

        [tiles, queries, dim], the filler where there is no query, or overlapping [tiles, keys, dim].
        """
        strides = tensor.stride()
        key = (name, self.name, unit.place, strides, tensor.shape[-1])
        found = self.memory.views.get(key)
        if found is None:
            found = self._copied(name, tensor, unit, queries)
            self.memory.views[key] = found
        moves, result, fill = found
        for part in fill:
            part.fill_(filler)
        start = unit.batch.start * strides[0] + unit.heads.start * strides[-2] * (self.repeats if queries else 1)
        start += tensor.storage_offset()
        for goal, sizes, steps, offset in moves:
            goal.copy_(tensor.as_strided(sizes, steps, start + offset))
        return result

    def put(self, made: Tensor, whole: Tensor, unit: _Unit, factor: Tensor | float = 1.0, add: bool = False) -> None:
        """Write (or add) query tiles, times a factor (of each row), into [B, *grid, heads, dim]."""
        strides, dim = whole.stride(), whole.shape[-1]
        key = ("put", self.name, unit.place, strides, dim)
        moves = self.memory.views.get(key)
        if moves is None:
            moves, _ = self.plan.moves("queries", unit.region, (*unit.shape, self.repeats), strides, dim)
            self.memory.views[key] = moves
        start = unit.batch.start * strides[0] + unit.heads.start * strides[-2] * self.repeats
        for move in moves:
            part, goal = move.of_copy(made), whole.as_strided(move.sizes, move.strides, start + move.offset)
            if isinstance(factor, Tensor):
                torch.mul(part, move.of_factor(factor), out=goal)
            elif add:
                goal.add_(part, alpha=factor)
            elif factor != 1.0:
                torch.mul(part, factor, out=goal)
            else:
                goal.copy_(part)

    def put_keys(self, made: Tensor, whole: Tensor, unit: _Unit, factor: float = 1.0) -> None:
        """Add strips [keys, dim] of a unit, times a factor, to [B, *grid, heads_kv, dim].

        Written where each key is in one box.
        """
        strides, dim = whole.stride(), whole.shape[-1]
        key = ("put keys", self.name, unit.place, strides, dim)
        moves = self.memory.views.get(key)
        if moves is None:
            moves, _ = self.plan.moves("sums", unit.region, (*unit.shape, 1), strides, dim)
            self.memory.views[key] = moves
        start = unit.batch.start * strides[0] + unit.heads.start * strides[-2]
        for move in moves:
            part, goal = move.of_copy(made), whole.as_strided(move.sizes, move.strides, start + move.offset)
            if self.plan.key_once:
                torch.mul(part, factor, out=goal)
            else:
                goal.add_(part, alpha=factor)

    def sum_boxes(self, name: str, left: Tensor, right: Tensor, unit: _Unit, tiles: slice) -> Tensor:
        """The sums of left @ right, boxes [tiles, keys, dim], over the boxes that hold a key, in strips [keys, dim].

        For a range of a unit's tiles; every range adds to the same strips. What boxes hold beyond the ends is zero, and
        so is left out. As many rows of the boxes at a time as there are between two tiles: those of all tiles are then
        as they lie in the strips.
        """
        cut, dim = self.plan, right.shape[-1]
        before, after = cut.margin
        step = cut.loop.tile * cut.row
        whole = self.scratch(name, (before + unit.strips * cut.strip + after) * cut.row, dim)
        start = (before + cut.loop.first[0]) * cut.row + tiles.start * step
        end = start + len(left) * step
        for key in range(0, cut.keys, step):
            part = left[:, key : key + step]
            at = whole.storage_offset() + (start + key) * dim
            goal = whole.as_strided((len(left), part.shape[1], dim), (step * dim, dim, 1), at)
            if key or tiles.start:
                goal.add_(self.product("d_box", part, right))
                continue
            whole[:start].zero_()
            whole[start if part.shape[1] < step else end :].zero_()
            if part.shape[1] < step:
                goal.copy_(self.product("d_box", part, right))
            else:
                torch.bmm(part, right, out=goal)
        return whole[before * cut.row : (before + unit.strips * cut.strip) * cut.row]

    # -- masks and biases

    def whole(self, tensor: Tensor, unit: _Unit) -> Tensor:
        """[tiles, a, b] of a chunk as [b, heads, groups, tiles of a group, a, b]."""
        return tensor.view(*unit.shape, unit.groups, -1, *tensor.shape[1:])

    def of_chunk(self, table: Tensor, unit: _Unit, tiles: slice) -> Tensor:
        """The part of a table [..., groups or 1, tiles, a, b] for a range of a unit's tiles."""
        return table if unit.strips > 1 else table[..., tiles, :, :]

    def apply(self, logits: Tensor, unit: _Unit, tiles: slice, bias: Tensor | None, added: bool) -> None:
        """Multiply a chunk's weights with 0 where a query doesn't see a key, else exp(bias).

        Or, `added`: add -inf, or the bias over log 2, to its logits.
        """
        table = self.plan.mask(unit.region, self.repeats, added) if bias is None else None
        if bias is not None:
            table = self._bias_table(bias, unit, added)
        if table is None:
            return
        part = self.of_chunk(table, unit, tiles).flatten(-3)
        whole = logits.view(*unit.shape, unit.groups, -1)
        if added:
            whole.add_(part)
        else:
            whole.mul_(part)

    def _bias_table(self, bias: Tensor, unit: _Unit, added: bool) -> Tensor:
        """The offset bias, its exponential or over log 2, -inf or 0 where a key is not seen."""
        cut = self.plan
        name = (cut.kinds(unit.region), unit.heads.start, added)
        if name in self._tables:
            return self._tables[name]
        heads = slice(unit.heads.start * self.repeats, unit.heads.stop * self.repeats)
        by_offset, index = bias.flatten(1)[heads].to(self.dtype), cut.seen_offset(unit.region)
        by_offset = by_offset * _LOG2E if added else by_offset.exp()
        by_offset = torch.constant_pad_nd(by_offset, (0, 1), -math.inf if added else 0.0)
        taken = by_offset.index_select(1, index.flatten()).view(-1, *index.shape)
        made = cut.spread(taken.unflatten(0, (-1, self.repeats)).movedim(1, -2).flatten(-2), unit.region)
        if sum(table.numel() for table in self._tables.values()) + made.numel() <= _BIAS:
            self._tables[name] = made
        return made

    def _index(self, table: Tensor, unit: _Unit, tiles: slice, lead: tuple[int, ...]) -> Tensor:
        """A table [groups or 1, tiles, a, queries] for every query head, expanded to lead and the unit's groups."""
        part = self.of_chunk(table, unit, tiles).repeat(1, 1, 1, self.repeats)
        return part.expand(*lead, unit.groups, *part.shape[1:])

    def add_tables(self, logits: Tensor, unit: _Unit, tiles: slice, bias: Tensor | None, rows: Tensor | None) -> None:
        """The bias and -inf where a query doesn't see a key, added to a chunk's logits over log 2.

        rows: the query tiles of a bias by query, over log 2; of one batch entry where all share a bias.
        """
        if rows is None:
            self.apply(logits, unit, tiles, bias, added=True)
            return
        lead = (unit.shape[0] if bias is not None and bias.shape[0] > 1 else 1, unit.shape[1])
        at = rows if unit.strips > 1 else rows[tiles]
        at = at.transpose(1, 2).unflatten(0, (*lead, unit.groups, -1))
        taken = at.gather(-2, self._index(self.plan.slot(unit.region), unit, tiles, lead))
        mask = self.plan.mask(unit.region, self.repeats, added=True)
        if mask is not None:
            taken.masked_fill_(self.of_chunk(mask, unit, tiles) < 0, -math.inf)
        self.whole(logits, unit).add_(taken)

    def take_slots(self, grad: Tensor, goal: Tensor, unit: _Unit, tiles: slice) -> None:
        """The gradient of a chunk's logits [tiles, keys, queries] by window slot, into goal [tiles, queries, slots]."""
        at, present = self.plan.place(unit.region)
        taken = self.whole(grad, unit).gather(-2, self._index(at, unit, tiles, unit.shape))
        taken *= self._index(present, unit, tiles, unit.shape)
        goal.copy_(taken.flatten(0, 3).transpose(1, 2))

    def put_bias(self, made: Tensor, whole: Tensor, unit: _Unit) -> None:
        """Add query tiles of slots to the gradient of a bias by query, [B or 1, *grid, heads, slots]."""
        if whole.shape[0] == 1:
            made = made.view(unit.shape[0], -1, *made.shape[1:]).sum(0)
            unit = replace(unit, batch=slice(0, 1))
        self.put(made, whole, unit, add=True)


class _Inputs:
    """A call's tensors, and their copies for one unit."""

    def __init__(self, call: _Call, tensors: tuple[Tensor | None, ...]) -> None:
        self.call = call
        query, key, value, self.bias, self.additional_keys, self.additional_values = tensors
        assert query is not None and key is not None and value is not None
        self.query, self.key, self.value = query, key, value

    def copy(self, unit: _Unit, values: bool = True) -> None:
        """Copy a unit's part into tiles and boxes."""
        call = self.call
        self.queries = call.copy("query", self.query, unit, True)
        self.keys = call.copy("key", self.key, unit, False)
        self.values = call.copy("value", self.value, unit, False) if values else self.keys
        self.far_key, self.far_value = self._far(unit, self.additional_keys), self._far(unit, self.additional_values)
        self.bias_rows = None
        if self.bias is not None and call.problem.bias == "query":
            shared = replace(unit, batch=slice(0, 1)) if self.bias.shape[0] == 1 else unit
            self.bias_rows = call.copy("bias", self.bias, shared, True).mul_(_LOG2E)

    def _far(self, unit: _Unit, tensor: Tensor | None) -> Tensor | None:
        """Additional keys or values [B, n, heads_kv, dim] as [b * heads_kv, n, dim]."""
        if tensor is None or tensor.shape[1] == 0:
            return None
        return tensor[unit.batch, :, unit.heads].transpose(1, 2).to(self.call.dtype).flatten(0, 1)

    def _logits(self, unit: _Unit, tiles: slice, scale: float) -> tuple[Tensor, Tensor | None]:
        """scale times the products of a chunk's queries with its keys, and with its additional keys."""
        queries = self.queries[tiles]
        near = self.call.product("logits", self.keys[tiles], queries.transpose(1, 2), scale)
        if self.far_key is None:
            return near, None
        flat = queries.reshape(unit.matrices, -1, queries.shape[-1]).transpose(1, 2)
        return near, self.call.product("far", self.far_key, flat, scale)

    def bounded_weights(self, unit: _Unit, tiles: slice, clamp: bool = False) -> tuple[Tensor, Tensor | None]:
        """exp(logits) of a chunk, [tiles, keys, queries], and of its additional keys, [matrices, n, queries].

        clamp: nothing has shown the logits of keys that are not seen to be small; they must not become infinite.
        """
        weights, far = self._logits(unit, tiles, self.call.problem.scale)
        if clamp and not self.call.plan.closed:
            weights.clamp_(max=2 * _SAFE)  # the others are below lse - bias
        weights.exp_()
        self.call.apply(weights, unit, tiles, self.bias, added=False)
        return weights, None if far is None else far.exp_()

    def shifted_weights(
        self, unit: _Unit, tiles: slice, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """2 ** (logits / log 2 - shift) of a chunk and of its additional keys, shaped as above, and the shift.

        shift: [tiles, queries], the rows' largest logits where None. A row without keys has the shift 0.
        """
        weights, far = self._logits(unit, tiles, self.call.problem.scale * _LOG2E)
        self.call.add_tables(weights, unit, tiles, self.bias, self.bias_rows)
        if shift is None:
            shift = weights.amax(-2)
            if far is not None:
                shift = torch.maximum(shift, far.amax(-2).view_as(shift))
        shift = shift.masked_fill(shift == -math.inf, 0.0)
        weights.sub_(shift[:, None]).exp2_()
        if far is not None:
            far.sub_(shift.reshape(unit.matrices, 1, -1)).exp2_()
        return weights, far, shift


def _bounded(problem: Problem, bias: Tensor | None, unseen: tuple[Tensor, ...]) -> bool:
    """Whether nothing speaks against weights without a maximum, but the denominators' size.

    unseen: what queries meet in their boxes without seeing it; it is multiplied with 0 and so must be finite.
    """
    if problem.bias == "query" or problem.batch == 0:
        return False
    if not all(math.isfinite(float(tensor.sum(dtype=problem.compute_dtype))) for tensor in unseen):
        return False
    if bias is None:
        return True
    least, most = bias.aminmax()
    if float(least) == -math.inf:  # such keys are not seen; what matters is the others
        least, most = bias.masked_fill(bias == -math.inf, 0.0).aminmax()
    return float(least) >= _BIASES[0] and float(most) <= _BIASES[1]


def _safe(lse: Tensor) -> bool:
    """Whether weights without a maximum are exact, by the logarithms of the denominators."""
    least, most = lse.aminmax()
    return float(least) >= -_SAFE and float(most) <= _SAFE


def _unit_forward(inputs: _Inputs, unit: _Unit, bounded: bool, out: Tensor, lse: Tensor) -> None:
    """out of a unit, and its lse, of which the logarithm is left to the caller if `bounded`."""
    call, shape = inputs.call, inputs.queries.shape[:-1]
    made, total = call.scratch("out", *shape, inputs.value.shape[-1]), call.scratch("total", *shape)
    highest = None if bounded else call.scratch("highest", *shape)
    for tiles in call.chunks(unit):
        if highest is None:
            weights, far = inputs.bounded_weights(unit, tiles)
        else:
            weights, far, highest[tiles] = inputs.shifted_weights(unit, tiles)
        goal, sums = made[tiles], total[tiles]
        torch.sum(weights, -2, out=sums)
        torch.bmm(weights.transpose(1, 2), inputs.values[tiles], out=goal)
        if far is not None and inputs.far_value is not None:
            sums += far.sum(-2).view_as(sums)
            goal += torch.bmm(far.transpose(1, 2), inputs.far_value).view_as(goal)
    # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
    divisor = total if bounded else total.masked_fill(total == 0.0, 1.0)
    call.put(made, out, unit, divisor.reciprocal())
    if highest is not None:
        total.log2_().add_(highest).mul_(_LN2)
    call.put(total[..., None], lse[..., None], unit)


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
    tensors = (query, key, value, bias, additional_keys, additional_values)
    closed = plan(problem, tile).closed
    for bounded in (True, False):
        # keys that are not finite show in lse
        if bounded and not _bounded(problem, bias, () if closed else (value,)):
            continue
        call = _Call(problem, tile, separate=not bounded)
        inputs, units = _Inputs(call, tensors), list(call.units())
        first = len(units) > 1  # what one unit tells early is what lse tells in the end
        for unit in units:
            inputs.copy(unit)
            _unit_forward(inputs, unit, bounded, out, lse)
            if bounded and first and not _safe(call.scratch("total", *inputs.queries.shape[:-1]).log()):
                break
            first = False
        else:
            if not bounded or _safe(lse.log_()):
                break
    call.memory.trim()
    return out, lse


class _BiasGradient:
    """Sums the logits' gradients into an offset bias's."""

    def __init__(self, call: _Call, bias: Tensor) -> None:
        self.call = call
        self.total = torch.zeros(bias.shape, dtype=call.dtype)
        self.sums: dict[tuple, tuple[Tensor, Tensor]] = {}

    def add(self, grad: Tensor, unit: _Unit, tiles: slice) -> None:
        """grad: a chunk's [tiles, keys, queries]; the sums are [heads_kv, kinds of tiles, keys, repeats * queries]."""
        cut = self.call.plan
        name = (cut.kinds(unit.region), unit.heads.start)
        if name not in self.sums:
            index = cut.offset(unit.region)
            if sum(kept.numel() for _, kept in self.sums.values()) + unit.shape[1] * index.numel() > _BIAS:
                self.flush()
            sums = torch.zeros(unit.shape[1], len(index), *grad.shape[1:], dtype=grad.dtype)
            self.sums[name] = (index.flatten(), sums)
        kinds = cut.samples(unit.region)[1]
        kinds = kinds if unit.strips > 1 else kinds[tiles]
        self.sums[name][1].index_add_(1, kinds, self.call.whole(grad, unit).sum((0, 2)))

    def flush(self) -> None:
        """Empty the sums into the table of offsets."""
        table, repeats = self.total.flatten(1), self.call.repeats
        for (_, first), (index, summed) in self.sums.items():
            by_head = summed.unflatten(-1, (repeats, -1)).movedim(-2, 1).flatten(0, 1).flatten(1)
            for head, weights in enumerate(by_head, first * repeats):
                table[head] += torch.bincount(index, weights.double(), table.shape[1]).to(table.dtype)
        self.sums.clear()


@dataclass
class _Gradients:
    """The gradients of a call in the computation's dtype, None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: _BiasGradient | None
    additional_keys: Tensor | None
    additional_values: Tensor | None

    def through_logits(self) -> bool:
        """Whether any but the values' is needed."""
        return any(each is not None for each in (self.query, self.key, self.bias, self.additional_keys))


def _add_far(whole: Tensor, part: Tensor, unit: _Unit) -> None:
    """Add [b * heads_kv, n, dim] to [B, n, heads_kv, dim]."""
    whole[unit.batch, :, unit.heads] += part.unflatten(0, unit.shape).transpose(1, 2)


def _unit_backward(
    inputs: _Inputs, unit: _Unit, bounded: bool, grads: _Gradients, grad_out: Tensor, lse: Tensor, delta: Tensor | None
) -> None:
    """Add a unit's part to `grads`.

    bounded: weights are exp(logit), and grad_out and delta are times exp(-lse).
    """
    call, problem = inputs.call, inputs.call.problem
    given = call.copy("grad", grad_out, unit, True)
    deltas = None if delta is None else call.copy("delta", delta[..., None], unit, True)
    logs = None  # infinite where there is no query: its weights are then 0, whatever the bias
    if not bounded:
        logs = call.copy("lse", lse[..., None], unit, True, math.inf).mul_(_LOG2E)
    d_query = call.scratch("out", *inputs.queries.shape) if grads.query is not None else None
    d_bias = d_key = d_value = None
    if grads.bias is not None and inputs.bias_rows is not None:
        d_bias = call.scratch("d_bias", *inputs.queries.shape[:-1], inputs.bias_rows.shape[-1])
    for tiles in call.chunks(unit):
        queries, grad, keys = inputs.queries[tiles], given[tiles], inputs.keys[tiles]
        if logs is None:
            weights, far = inputs.bounded_weights(unit, tiles, clamp=True)
        else:
            weights, far, _ = inputs.shifted_weights(unit, tiles, logs[tiles, :, 0])
        if grads.value is not None:
            d_value = call.sum_boxes("d_value", weights, grad, unit, tiles)
        shift = None
        if deltas is not None:
            shift = deltas[tiles]
            d_logits = call.product("d_logits", inputs.values[tiles], grad.transpose(1, 2))
            d_logits.sub_(shift.transpose(1, 2)).mul_(weights)
            if d_bias is not None:
                call.take_slots(d_logits, d_bias[tiles], unit, tiles)
            elif grads.bias is not None:
                grads.bias.add(d_logits, unit, tiles)
            if d_query is not None:
                torch.bmm(d_logits.transpose(1, 2), keys, out=d_query[tiles])
            if grads.key is not None:
                d_key = call.sum_boxes("d_key", d_logits, queries, unit, tiles)
        if far is None or inputs.far_key is None or inputs.far_value is None:
            continue
        far_query, far_grad = (t.reshape(unit.matrices, -1, t.shape[-1]) for t in (queries, grad))
        if grads.additional_values is not None:
            _add_far(grads.additional_values, torch.bmm(far, far_grad), unit)
        if shift is not None:
            d_far = call.product("d_far", inputs.far_value, far_grad.transpose(1, 2))
            d_far.sub_(shift.reshape(unit.matrices, 1, -1)).mul_(far)
            if d_query is not None:
                part = d_query[tiles]
                part += torch.bmm(d_far.transpose(1, 2), inputs.far_key).view_as(part)
            if grads.additional_keys is not None:
                _add_far(grads.additional_keys, torch.bmm(d_far, far_query).mul_(problem.scale), unit)
    if d_query is not None and grads.query is not None:
        call.put(d_query, grads.query, unit, problem.scale)
    if d_key is not None and grads.key is not None:
        call.put_keys(d_key, grads.key, unit, problem.scale)
    if d_value is not None and grads.value is not None:
        call.put_keys(d_value, grads.value, unit)
    if d_bias is not None and grads.bias is not None:
        call.put_bias(d_bias, grads.bias.total, unit)


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
    needs: tuple[bool, ...] = (True,) * 6,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, bias, additional_keys and additional_values; None where not needed.

    With p = exp(logits - lse): dp = <grad_out, value>, dlogits = p * (dp - <grad_out, out> + grad_lse).
    """
    tensors = (query, key, value, bias, additional_keys, additional_values)
    asked = [needed and tensor is not None for needed, tensor in zip(needs, tensors, strict=True)]
    dtype = problem.compute_dtype
    bounded = _bounded(problem, bias, () if plan(problem, tile).closed else (key, value)) and _safe(lse)
    call = _Call(problem, tile, separate=not bounded)

    def zeros(number: int) -> Tensor | None:
        tensor = tensors[number]
        return torch.zeros(tensor.shape, dtype=dtype) if tensor is not None and asked[number] else None

    fresh = torch.empty if call.plan.key_once else torch.zeros
    grads = _Gradients(
        torch.empty_like(query, memory_format=torch.contiguous_format) if asked[0] else None,
        fresh(key.shape, dtype=dtype) if asked[1] else None,
        fresh(value.shape, dtype=dtype) if asked[2] else None,
        _BiasGradient(call, bias) if asked[3] and bias is not None else None,
        zeros(4),
        zeros(5),
    )
    delta = None
    if grads.through_logits():
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse
    if bounded:
        inverse = lse.neg().exp_()
        grad_out = grad_out.to(dtype) * inverse[..., None]
        delta = None if delta is None else delta.mul_(inverse)
    inputs = _Inputs(call, tensors)
    for unit in call.units():
        inputs.copy(unit, values=delta is not None)
        _unit_backward(inputs, unit, bounded, grads, grad_out, lse, delta)
    call.memory.trim()
    if grads.bias is not None:
        grads.bias.flush()
    bias_total = None if grads.bias is None else grads.bias.total
    found = (grads.query, grads.key, grads.value, bias_total, grads.additional_keys, grads.additional_values)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, tensors, strict=True)
    )
