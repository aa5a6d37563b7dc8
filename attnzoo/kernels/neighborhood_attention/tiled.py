"""The CPU path: tiles of queries against the box of keys around them, by batched matrix products, forward and backward.

Queries, keys and values are copied into tiles and boxes once (see `tiling.py` for the cut; half types become float32
there: half-precision products are tens of times slower on most CPUs), some batch entries or heads at a time. Logits
are made transposed, [keys, queries] per tile: the products then read rows as they lie, and reorder the few queries of
a tile rather than its many keys. Memory beyond inputs and outputs is those copies and the logits of CHUNK pairs, never
tokens x tokens.

The softmax subtracts no maximum at first: where every row's denominator turns out to be within 2 ** +-_SAFE, the
result is as exact without. Where one is not, the part is computed again with the maximum, and so is all that follows.
The backward pass computes the logits again from lse, whatever back end made them; a gradient that several tiles share
is summed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention import tiling
from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.neighborhood_attention.tiling import Box, Plan, plan

_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_SAFE = 80.0
_COPIES = 1 << 23  # elements of one tensor's copy
_BIAS = 1 << 23  # elements of bias tables that a call keeps


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all (the device is judged by `dispatch`)."""
    return []


@dataclass(frozen=True)
class _Unit:
    """Batch entries and key heads whose copies are made together."""

    batch: slice
    heads: slice

    @property
    def shape(self) -> tuple[int, int]:
        """How many of each."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @property
    def matrices(self) -> int:
        """Batch entries times key heads."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Chunk:
    """What is worked on at a time: of one loop tile, the inner tiles `tiles` of the groups `groups`.

    It is all of them, or the unit is one batch entry and head. rows: the same as a slice of the unit's boxes.
    """

    number: int
    groups: slice
    tiles: slice
    rows: slice


class _Call:
    """A problem with its plan, and memory for its intermediate results."""

    def __init__(self, problem: Problem, tile: tuple[int, ...] | None = None) -> None:
        self.problem = problem
        self.plan: Plan = plan(problem, tile)
        self.repeats = problem.num_heads // problem.num_heads_kv
        self.dtype = problem.compute_dtype
        self.rows = self.plan.queries * self.repeats  # of a tile's logits, once per query head
        self._scratch: dict[str, Tensor] = {}
        self._tables: dict[tuple[int, int, int], Tensor] = {}

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A buffer of this call, the same memory at every request of one name: fresh pages cost as much as the sums."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=self.dtype)
        return self._scratch[name][:size].view(shape)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The batched matrix product in a scratch buffer."""
        return torch.bmm(left, right, out=self.scratch(name, *left.shape[:2], right.shape[2]))

    # -- the passes over the grid

    def units(self) -> Iterator[_Unit]:
        """The passes, within the limits on memory."""
        cut, problem = self.plan, self.problem
        boxes = cut.groups * cut.inner_tiles
        copied = boxes * max(cut.span[1] * cut.inner_width, self.rows * len(cut.loop.first))
        copied *= max(problem.head_dim, problem.head_dim_v)
        most = min(self.chunk // (boxes * cut.most_keys * self.rows), _COPIES // copied)
        heads = max(1, min(problem.num_heads_kv, most))
        heads = -(-problem.num_heads_kv // -(-problem.num_heads_kv // heads))  # units of one size
        entries = max(1, most // heads) if heads == problem.num_heads_kv else 1
        for entry in range(0, problem.batch, entries):
            for head in range(0, problem.num_heads_kv, heads):
                batch = slice(entry, min(entry + entries, problem.batch))
                yield _Unit(batch, slice(head, min(head + heads, problem.num_heads_kv)))

    @property
    def chunk(self) -> int:
        """Pairs that are worked on at a time; more where threads share them."""
        return tiling.CHUNK * torch.get_num_threads()

    def boxes(self, unit: _Unit) -> int:
        """Boxes of a unit, as many as tiles per loop tile."""
        return unit.matrices * self.plan.groups * self.plan.inner_tiles

    def chunks(self, unit: _Unit) -> Iterator[_Chunk]:
        """A unit in pieces whose logits may be held at once."""
        cut = self.plan
        groups, tiles = cut.groups, cut.inner_tiles
        for number in range(len(cut.loop.first)):
            held = max(1, self.chunk // (cut.keys(number)[1] * self.rows))
            if unit.matrices > 1 or held >= groups * tiles:
                yield _Chunk(number, slice(0, groups), slice(0, tiles), slice(0, unit.matrices * groups * tiles))
                continue
            at_once, part = max(1, held // tiles), min(held, tiles)
            part = -(-tiles // -(-tiles // part))
            for group in range(0, groups, at_once):
                end = min(group + at_once, groups)
                for tile in range(0, tiles, part):
                    stop = min(tile + part, tiles)
                    rows = slice(group * tiles + tile, (end - 1) * tiles + stop)
                    yield _Chunk(number, slice(group, end), slice(tile, stop), rows)

    # -- copies

    def _view(self, tensor: Tensor, unit: _Unit, piece: tuple[Box, ...], queries: bool) -> Tensor:
        """A piece of [B, *grid, heads, dim] in the order of the copies (module `tiling`), a strided view."""
        batch, *axes, heads, last = tensor.stride()
        if self.plan.own_loop:
            axes.insert(0, 0)
        repeats = self.repeats if queries else 1
        shapes = [box.shape for box in piece]
        entries, number = unit.shape
        start = tensor.storage_offset() + unit.batch.start * batch + unit.heads.start * repeats * heads
        start += sum(stride * box.first for stride, box in zip(axes, piece))
        sizes = [entries, number, *(shape[0] for shape in shapes), *(shape[1] for shape in shapes[1:])]
        strides = [batch, heads * repeats, *axes, *(stride * box.step for stride, box in zip(axes[1:], piece[1:]))]
        if queries:
            sizes, strides = [shapes[0][1], *sizes, repeats], [axes[0] * piece[0].step, *strides, heads]
        sizes += [*(shape[2] for shape in shapes), tensor.shape[-1]]
        strides += [*(stride * box.dilation for stride, box in zip(axes, piece)), last]
        return tensor.as_strided(sizes, strides, start)

    def _part(self, copy: Tensor, piece: tuple[Box, ...], queries: bool) -> Tensor:
        """The same piece of a copy."""
        everything = slice(None)
        index = [everything, everything, *(box.groups for box in piece), *(box.tiles for box in piece[1:])]
        if queries:
            index = [piece[0].tiles, *index, everything]
        return copy[(*index, *(box.places for box in piece))]

    def _shape(self, unit: _Unit, queries: bool) -> list[int]:
        """The shape of a copy, but for the last dimension."""
        cut = self.plan
        shape = [*unit.shape, *(t.axis.groups for t in cut.tiles), *(len(t.first) for t in cut.inner)]
        if queries:
            return [len(cut.loop.first), *shape, self.repeats, *(t.tile for t in cut.tiles)]
        return [*shape, cut.span[1], *(t.widths[0] for t in cut.inner)]

    def _copied(self, name: str, tensor: Tensor, unit: _Unit, queries: bool) -> Tensor:
        shape = [*self._shape(unit, queries), tensor.shape[-1]]
        pieces = self.plan.query_pieces if queries else self.plan.key_pieces
        copy = self.scratch(name, *shape)
        written = sum(math.prod(math.prod(box.shape) for box in piece) for piece in pieces)
        if written * unit.matrices * tensor.shape[-1] * (self.repeats if queries else 1) < copy.numel():
            copy.zero_()  # somewhere there is no token
        for piece in pieces:
            self._part(copy, piece, queries).copy_(self._view(tensor, unit, piece, queries))
        return copy

    def query_tiles(self, name: str, tensor: Tensor, unit: _Unit) -> Tensor:
        """A copy of [B, *grid, heads, dim] as [loop tiles, boxes, queries, dim]."""
        copy = self._copied(name, tensor, unit, True)
        return copy.view(len(self.plan.loop.first), -1, self.rows, tensor.shape[-1])

    def key_boxes(self, name: str, tensor: Tensor, unit: _Unit) -> Tensor:
        """A copy of [B, *grid, heads_kv, dim] as [boxes, keys, dim]."""
        cut = self.plan
        return self._copied(name, tensor, unit, False).view(-1, cut.span[1] * cut.inner_width, tensor.shape[-1])

    def whole_tiles(self, tiles: Tensor, unit: _Unit) -> Tensor:
        """[loop tiles, boxes, queries, ...] with all the dimensions of a copy."""
        return tiles.view(*self._shape(unit, True), tiles.shape[-1])

    def put(self, made: Tensor, whole: Tensor, unit: _Unit, divisor: Tensor | None = None, scale: float = 1.0) -> None:
        """Write query tiles, over a divisor or times a scale, into [B, *grid, heads, dim]."""
        made = self.whole_tiles(made, unit)
        divisor = None if divisor is None else self.whole_tiles(divisor, unit)
        for piece in self.plan.query_pieces:
            part, goal = self._part(made, piece, True), self._view(whole, unit, piece, True)
            if divisor is not None:
                torch.div(part, self._part(divisor, piece, True), out=goal)
            elif scale != 1.0:
                torch.mul(part, scale, out=goal)
            else:
                goal.copy_(part)

    def put_keys(self, made: Tensor, whole: Tensor, unit: _Unit, scale: float = 1.0) -> None:
        """Add key boxes, times a scale, to [B, *grid, heads_kv, dim] (written where each key is in one box)."""
        made = made.view(*self._shape(unit, False), made.shape[-1])
        for piece in self.plan.key_sums:
            goal, part = self._view(whole, unit, piece, False), self._part(made, piece, False)
            if self.plan.key_once:
                torch.mul(part, scale, out=goal)
            else:
                goal.add_(part, alpha=scale)

    # -- logits

    def _groups(self, tensor: Tensor, chunk: _Chunk, matrices: int) -> Tensor:
        """A chunk's [boxes, a, b] as [matrices, groups, tiles, a, b]."""
        groups = chunk.groups.stop - chunk.groups.start
        return tensor.view(matrices, groups, chunk.tiles.stop - chunk.tiles.start, *tensor.shape[1:])

    def _of_chunk(self, table: Tensor, chunk: _Chunk) -> Tensor:
        """The part of a table [..., groups or 1, inner tiles, a, b] that a chunk needs."""
        return table[..., chunk.groups if table.shape[-4] > 1 else slice(None), chunk.tiles, :, :]

    def add_tables(
        self, logits: Tensor, chunk: _Chunk, unit: _Unit, bias: Tensor | None, tiles: Tensor | None, scale: float
    ) -> None:
        """logits [boxes, keys, queries] times scale, plus the bias over log 2, -inf where a query doesn't see a key.

        tiles: the query tiles of a bias by query, over log 2.
        """
        if tiles is not None:
            self._add_query_bias(logits, chunk, unit, tiles, scale)
            return
        table = self.plan.mask(chunk.number, self.repeats) if bias is None else self._bias_table(bias, chunk, unit)
        if table is None:
            logits.mul_(scale)
            return
        table = self._of_chunk(table, chunk).flatten(-2)
        whole = self._groups(logits, chunk, unit.matrices).unflatten(0, unit.shape).flatten(-2)
        torch.add(table, whole, alpha=scale, out=whole)

    def _bias_table(self, bias: Tensor, chunk: _Chunk, unit: _Unit) -> Tensor:
        """The offset bias over log 2, [heads, groups or 1, tiles, keys, queries] of a loop tile, -inf where unseen."""
        cut = self.plan
        name = (cut.loop.kind[chunk.number], unit.heads.start)
        if name in self._tables:
            return self._tables[name]
        heads = slice(unit.heads.start * self.repeats, unit.heads.stop * self.repeats)
        taken = (bias.flatten(1)[heads].to(self.dtype) * _LOG2E)[:, None, cut.offset(chunk.number)]
        taken = torch.where(cut.allowed(chunk.number), taken, -math.inf)  # [heads, groups or 1, kinds, keys, queries]
        made = taken.unflatten(0, (-1, self.repeats)).movedim(1, -2).flatten(-2)
        made = made.index_select(2, cut.joined_kinds()[1])
        if sum(table.numel() for table in self._tables.values()) + made.numel() <= _BIAS:
            self._tables[name] = made
        return made

    def _index(self, table: Tensor, chunk: _Chunk, matrices: int) -> Tensor:
        """A table [groups or 1, inner tiles, a, queries] of a chunk, for each matrix and query head."""
        part = self._of_chunk(table, chunk).repeat(1, 1, 1, self.repeats)
        return part.expand(matrices, chunk.groups.stop - chunk.groups.start, *part.shape[1:])

    def _add_query_bias(self, logits: Tensor, chunk: _Chunk, unit: _Unit, tiles: Tensor, scale: float) -> None:
        at = tiles[chunk.number, chunk.rows].transpose(1, 2)  # one batch entry's where all share a bias
        matrices = unit.matrices if tiles.shape[1] == self.boxes(unit) else unit.shape[1]
        at = self._groups(at, chunk, matrices)
        added = at.gather(-2, self._index(self.plan.slot(chunk.number), chunk, matrices))
        mask = self.plan.mask(chunk.number, self.repeats)
        if mask is not None:
            added.masked_fill_(self._of_chunk(mask, chunk) < 0, -math.inf)
        whole = logits.view(-1, *added.shape)
        torch.add(added, whole, alpha=scale, out=whole)

    def take_slots(self, grad: Tensor, goal: Tensor, chunk: _Chunk, unit: _Unit) -> None:
        """The gradient of a chunk's logits [boxes, keys, queries] by window slot, into goal [boxes, queries, slots]."""
        at, present = self.plan.place(chunk.number)
        taken = self._groups(grad, chunk, unit.matrices).gather(-2, self._index(at, chunk, unit.matrices))
        taken *= self._index(present, chunk, unit.matrices)
        goal.copy_(taken.flatten(0, 2).transpose(1, 2))

    def put_bias(self, made: Tensor, whole: Tensor, unit: _Unit) -> None:
        """Add query tiles of slots to the gradient of a bias by query, [B or 1, *grid, heads, slots]."""
        shared = whole.shape[0] == 1
        made = self.whole_tiles(made, unit)
        if shared:
            made, unit = made.sum(1, keepdim=True), _Unit(slice(0, 1), unit.heads)
        for piece in self.plan.query_pieces:
            self._view(whole, unit, piece, True).add_(self._part(made, piece, True))


def _additional(call: _Call, unit: _Unit, tensor: Tensor | None) -> Tensor | None:
    """Additional keys or values [B, n, heads_kv, dim] as [b * heads_kv, n, dim] for one unit."""
    if tensor is None or tensor.shape[1] == 0:
        return None
    return tensor[unit.batch, :, unit.heads].transpose(1, 2).to(call.dtype).flatten(0, 1)


def _bias_tiles(call: _Call, unit: _Unit, bias: Tensor | None) -> Tensor | None:
    """The query tiles of a bias by query, over log 2; None for another bias."""
    if bias is None or call.problem.bias != "query":
        return None
    shared = _Unit(slice(0, 1), unit.heads) if bias.shape[0] == 1 else unit
    return call.query_tiles("bias", bias, shared).mul_(_LOG2E)


def _unit_forward(
    call: _Call, unit: _Unit, shift: bool, tensors: tuple[Tensor | None, ...], out: Tensor, lse: Tensor
) -> bool:
    """out and lse of a unit, with or without a maximum subtracted; without, False where it has to be.

    Then out and lse are not written.
    """
    query, key, value, bias, additional_keys, additional_values = tensors
    assert query is not None and key is not None and value is not None
    scale = call.problem.scale * _LOG2E
    queries, keys = call.query_tiles("query", query, unit), call.key_boxes("key", key, unit)
    values, bias_tiles = call.key_boxes("value", value, unit), _bias_tiles(call, unit, bias)
    far_key, far_value = (_additional(call, unit, t) for t in (additional_keys, additional_values))
    made = call.scratch("out", *queries.shape[:-1], value.shape[-1])
    total = call.scratch("total", *queries.shape[:-1])
    highest = call.scratch("highest", *queries.shape[:-1]) if shift else None
    for chunk in call.chunks(unit):
        first, count = call.plan.keys(chunk.number)
        tiles = queries[chunk.number, chunk.rows]
        logits = call.product("logits", keys[chunk.rows, first : first + count], tiles.transpose(1, 2))
        call.add_tables(logits, chunk, unit, bias, bias_tiles, scale)
        far = None
        if far_key is not None:
            far = call.product("far", far_key, tiles.reshape(unit.matrices, -1, tiles.shape[-1]).transpose(1, 2))
            far = far.mul_(scale)
        if highest is not None:
            top = logits.amax(-2)
            if far is not None:
                top = torch.maximum(top, far.amax(-2).view_as(top))
            top = top.masked_fill_(top == -math.inf, 0.0)
            highest[chunk.number, chunk.rows] = top
            logits.sub_(top[:, None])
            if far is not None:
                far.sub_(top.view(unit.matrices, 1, -1))
        logits.exp2_()
        goal, sums = made[chunk.number, chunk.rows], total[chunk.number, chunk.rows]
        torch.sum(logits, -2, out=sums)
        torch.bmm(logits.transpose(1, 2), values[chunk.rows, first : first + count], out=goal)
        if far is not None and far_value is not None:
            far.exp2_()
            sums += far.sum(-2).view_as(sums)
            goal += torch.bmm(far.transpose(1, 2), far_value).view_as(goal)
    if highest is None:
        least, most = (float(bound) for bound in total.aminmax())
        if not (least >= 2.0**-_SAFE and most <= 2.0**_SAFE):
            return False
    # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
    divisor = total if bias is None else total.masked_fill(total == 0.0, 1.0)
    call.put(made, out, unit, divisor[..., None])
    log_total = total.log2_() if highest is None else total.log2_().add_(highest)
    call.put(log_total.mul_(_LN2)[..., None], lse[..., None], unit)
    return True


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
    call, shift = _Call(problem, tile), False
    tensors = (query, key, value, bias, additional_keys, additional_values)
    for unit in call.units():
        shift = shift or not _unit_forward(call, unit, False, tensors, out, lse)
        if shift:
            _unit_forward(call, unit, True, tensors, out, lse)
    return out, lse


class _BiasGradient:
    """Sums the logits' gradients into the bias's."""

    def __init__(self, call: _Call, bias: Tensor) -> None:
        self.call, self.bias = call, bias
        self.total = torch.zeros(bias.shape, dtype=call.dtype)
        self.sums: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, grad: Tensor, unit: _Unit, chunk: _Chunk) -> None:
        """grad: a chunk's [boxes, keys, queries]; the sums are [heads_kv, kinds, keys, repeats, queries]."""
        cut = self.call.plan
        name = (cut.loop.kind[chunk.number], unit.heads.start)
        if name not in self.sums:
            samples, _ = cut.joined_kinds()
            shape = (unit.shape[1], len(samples), *grad.shape[1:])
            if sum(kept.numel() for _, kept in self.sums.values()) + math.prod(shape) > _BIAS:
                self.flush()
            self.sums[name] = (chunk.number, torch.zeros(shape, dtype=grad.dtype))
        whole = self.call._groups(grad, chunk, unit.matrices).unflatten(0, unit.shape)
        kinds = cut.joined_kinds()[1][chunk.tiles]
        self.sums[name][1].index_add_(1, kinds, whole.sum((0, 2)))

    def flush(self) -> None:
        """Empty the sums into the table of offsets."""
        table, call = self.total.flatten(1), self.call
        for (_, first), (number, summed) in self.sums.items():
            index = call.plan.offset(number).flatten()
            by_head = summed.unflatten(-1, (call.repeats, -1)).movedim(-2, 1).flatten(0, 1).flatten(1)
            for head, weights in enumerate(by_head, first * call.repeats):
                table[head] += torch.bincount(index, weights.double(), table.shape[1]).to(table.dtype)
        self.sums.clear()


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
    needs = tuple(needed and tensor is not None for needed, tensor in zip(needs, tensors))
    dtype, call = problem.compute_dtype, _Call(problem, tile)
    through_logits = needs[0] or needs[1] or needs[3] or needs[4]
    scale = problem.scale * _LOG2E
    total = lse[..., None] * _LOG2E
    if bias is not None:
        total = total.masked_fill(total == -math.inf, 0.0)
    delta = None
    if through_logits:
        delta = torch.linalg.vecdot(grad_out.to(dtype), out.to(dtype))[..., None]
        if grad_lse is not None:
            delta -= grad_lse[..., None].to(dtype)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format) if needs[0] else None
    fresh = torch.empty if call.plan.key_once else torch.zeros
    grad_key, grad_value = (
        fresh(t.shape, dtype=dtype) if needed else None for t, needed in ((key, needs[1]), (value, needs[2]))
    )
    grad_bias = _BiasGradient(call, bias) if needs[3] and bias is not None else None
    grad_far_key, grad_far_value = (
        torch.zeros(t.shape, dtype=dtype) if needed and t is not None else None
        for t, needed in ((additional_keys, needs[4]), (additional_values, needs[5]))
    )
    for unit in call.units():
        queries, keys = call.query_tiles("query", query, unit), call.key_boxes("key", key, unit)
        grads, log_totals = call.query_tiles("grad", grad_out, unit), call.query_tiles("lse", total, unit)
        values = call.key_boxes("value", value, unit) if through_logits else None
        deltas = None if delta is None else call.query_tiles("delta", delta, unit)
        bias_tiles = _bias_tiles(call, unit, bias)
        d_query = call.scratch("d_query", *queries.shape) if needs[0] else None
        d_key = call.scratch("d_key", *keys.shape).zero_() if needs[1] else None
        d_value = call.scratch("d_value", *keys.shape[:2], value.shape[-1]).zero_() if needs[2] else None
        d_bias = None
        if grad_bias is not None and bias_tiles is not None:
            d_bias = call.scratch("d_bias", *queries.shape[:-1], bias_tiles.shape[-1])
        far_key, far_value = (_additional(call, unit, t) for t in (additional_keys, additional_values))
        for chunk in call.chunks(unit):
            at, rows = chunk.number, chunk.rows
            first, count = call.plan.keys(at)
            here = slice(first, first + count)
            tiles, grad = queries[at, rows], grads[at, rows]
            log_total = log_totals[at, rows].transpose(1, 2)
            logits = call.product("logits", keys[rows, here], tiles.transpose(1, 2))
            call.add_tables(logits, chunk, unit, bias, bias_tiles, scale)
            weights = logits.sub_(log_total).exp2_()
            if d_value is not None:
                d_value[rows, here] += call.product("d_box", weights, grad)
            d_logits = shift = None
            if values is not None and deltas is not None:
                shift = deltas[at, rows].transpose(1, 2)
                d_logits = call.product("d_logits", values[rows, here], grad.transpose(1, 2))
                d_logits.sub_(shift).mul_(weights)
                if grad_bias is not None and d_bias is None:
                    grad_bias.add(d_logits, unit, chunk)
                if d_bias is not None:
                    call.take_slots(d_logits, d_bias[at, rows], chunk, unit)
                if d_query is not None:
                    torch.bmm(d_logits.transpose(1, 2), keys[rows, here], out=d_query[at, rows])
                if d_key is not None:
                    d_key[rows, here] += call.product("d_box", d_logits, tiles)
            if far_key is not None and far_value is not None:
                far_query, far_grad = (t.reshape(unit.matrices, -1, t.shape[-1]) for t in (tiles, grad))
                far = call.product("far", far_key, far_query.transpose(1, 2)).mul_(scale)
                far.sub_(log_total.reshape(unit.matrices, 1, -1)).exp2_()
                if grad_far_value is not None:
                    _add_far(grad_far_value, torch.bmm(far, far_grad), unit)
                if shift is not None:
                    d_far = call.product("d_far", far_value, far_grad.transpose(1, 2))
                    d_far.sub_(shift.reshape(unit.matrices, 1, -1)).mul_(far)
                    if d_query is not None:
                        part = d_query[at, rows]
                        part += torch.bmm(d_far.transpose(1, 2), far_key).view_as(part)
                    if grad_far_key is not None:
                        _add_far(grad_far_key, torch.bmm(d_far, far_query).mul_(problem.scale), unit)
        if d_query is not None and grad_query is not None:
            call.put(d_query, grad_query, unit, scale=problem.scale)
        if d_key is not None and grad_key is not None:
            call.put_keys(d_key, grad_key, unit, problem.scale)
        if d_value is not None and grad_value is not None:
            call.put_keys(d_value, grad_value, unit)
        if d_bias is not None and grad_bias is not None:
            call.put_bias(d_bias, grad_bias.total, unit)
    if grad_bias is not None:
        grad_bias.flush()
    found = (grad_query, grad_key, grad_value, None if grad_bias is None else grad_bias.total)
    found += (grad_far_key, grad_far_value)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, tensors, strict=True)
    )


def _add_far(whole: Tensor, part: Tensor, unit: _Unit) -> None:
    """Add [b * heads_kv, n, dim] to [B, n, heads_kv, dim]."""
    whole[unit.batch, :, unit.heads] += part.unflatten(0, unit.shape).transpose(1, 2)
