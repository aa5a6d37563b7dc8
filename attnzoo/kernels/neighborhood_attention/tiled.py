"""The CPU path: tiles of queries against the box of keys around them, by batched matrix products, forward and backward.

Queries, keys and values are copied into tiles and boxes once (see `tiling.py` for the cut; half types become float32
there: half-precision products are tens of times slower on most CPUs), some batch entries or heads at a time. Logits
are made transposed, [keys, queries] per tile: the products then read rows as they lie, and reorder the few queries of
a tile rather than its many keys. Memory beyond inputs and outputs is those copies and the logits of CHUNK pairs, never
tokens x tokens.

At first weights are exp(logit) times a table (0 where a query doesn't see a key, else exp(bias)), without a maximum.
Where every denominator turns out to be within e ** +-_SAFE that is as exact as with one, and it takes half the passes
over the logits. Where one is not, or with a bias that is large or by query, the weights are 2 ** (logit - maximum)
with masks and bias added to the logits. The backward pass has the same two ways; it computes the logits again from
lse, whatever back end made them. A gradient that several tiles share is summed in a fixed order.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention import tiling
from attnzoo.kernels.neighborhood_attention.problem import Problem
from attnzoo.kernels.neighborhood_attention.tiling import Box, Chunk, Plan, plan

_LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_SAFE = 40.0  # of lse: a weight that is lost at exp(-87) is then below every result's rounding
_BIASES = (-_SAFE, 20.0)  # so that exp(bias) and what it multiplies lose nothing either
_COPIES = 1 << 23  # elements of one tensor's copy
_BIAS = 1 << 23  # elements of bias tables that a call keeps
_WORKSPACE = 1 << 22  # elements that a thread keeps from call to call

_kept = threading.local()


def reasons(problem: Problem) -> list[str]:
    """Why the CPU path can't serve `problem`: it serves all (the device is judged by `dispatch`)."""
    return []


@dataclass(frozen=True)
class _Unit:
    """Batch entries and key heads whose copies are made together."""

    batch: slice
    heads: slice

    @cached_property
    def shape(self) -> tuple[int, int]:
        """How many of each."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start

    @cached_property
    def matrices(self) -> int:
        """Batch entries times key heads."""
        return math.prod(self.shape)


class _Call:
    """A problem with its plan, and memory for its intermediate results."""

    def __init__(self, problem: Problem, tile: tuple[int, ...] | None = None) -> None:
        self.problem = problem
        self.plan: Plan = plan(problem, tile)
        self.repeats = problem.num_heads // problem.num_heads_kv
        self.dtype = problem.compute_dtype
        self.rows = self.plan.queries * self.repeats  # of a tile's logits, once per query head
        self._tables: dict[tuple[int, int, bool], Tensor] = {}
        self._parts: dict[tuple[int, int, bool], Tensor | None] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.chunk = tiling.CHUNK * torch.get_num_threads()  # pairs worked on at a time, more where threads share them
        if not hasattr(_kept, "memory"):
            _kept.memory = {}
        self._scratch: dict[tuple[str, torch.dtype], Tensor] = _kept.memory

    def close(self) -> None:
        """Give back memory beyond what a thread may keep."""
        if sum(buffer.numel() for buffer in self._scratch.values()) > _WORKSPACE:
            self._scratch.clear()

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A buffer, the same memory at every request of one name: fresh pages cost as much as the sums."""
        view = self._views.get((name, shape))
        if view is None:
            size, key = math.prod(shape), (name, self.dtype)
            kept = self._scratch.get(key)
            if kept is None or kept.numel() < size:
                self._scratch[key] = kept = torch.empty(size, dtype=self.dtype)
                self._views.clear()
            self._views[name, shape] = view = kept[:size].view(shape)
        return view

    def product(self, name: str, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """scale times the batched matrix product, in a scratch buffer."""
        made = self.scratch(name, *left.shape[:2], right.shape[2])
        return torch.baddbmm(made, left, right, beta=0, alpha=scale, out=made)

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

    def chunks(self, unit: _Unit) -> tuple[Chunk, ...]:
        """A unit in pieces whose logits may be held at once."""
        return self.plan.chunks(unit.matrices == 1, self.rows, self.chunk)

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
        pieces = self.plan.query_pieces if queries else self.plan.key_pieces
        copy = self.scratch(name, *self._shape(unit, queries), tensor.shape[-1])
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

    def put(self, made: Tensor, whole: Tensor, unit: _Unit, factor: Tensor | float = 1.0, add: bool = False) -> None:
        """Write (or add) query tiles, times a factor, into [B, *grid, heads, dim]."""
        made = made.view(*self._shape(unit, True), made.shape[-1])
        if isinstance(factor, Tensor):
            factor = factor.view(*self._shape(unit, True), 1)
        for piece in self.plan.query_pieces:
            part, goal = self._part(made, piece, True), self._view(whole, unit, piece, True)
            if isinstance(factor, Tensor):
                torch.mul(part, self._part(factor, piece, True), out=goal)
            elif add:
                goal.add_(part, alpha=factor)
            elif factor != 1.0:
                torch.mul(part, factor, out=goal)
            else:
                goal.copy_(part)

    def put_keys(self, made: Tensor, whole: Tensor, unit: _Unit, factor: float = 1.0) -> None:
        """Add key boxes, times a factor, to [B, *grid, heads_kv, dim] (written where each key is in one box)."""
        made = made.view(*self._shape(unit, False), made.shape[-1])
        for piece in self.plan.key_sums:
            goal, part = self._view(whole, unit, piece, False), self._part(made, piece, False)
            if self.plan.key_once:
                torch.mul(part, factor, out=goal)
            else:
                goal.add_(part, alpha=factor)

    # -- masks and biases

    def whole(self, tensor: Tensor, chunk: Chunk, matrices: int) -> Tensor:
        """A chunk's [boxes, a, b] as [matrices, groups, tiles, a, b]."""
        return tensor.view(matrices, *chunk.shape, *tensor.shape[1:])

    def of_chunk(self, table: Tensor, chunk: Chunk) -> Tensor:
        """The part of a table [..., groups or 1, inner tiles, a, b] that a chunk needs."""
        if chunk.rows is None:
            return table
        return table[..., chunk.groups if table.shape[-4] > 1 else slice(None), chunk.tiles, :, :]

    def table(self, chunk: Chunk, unit: _Unit, bias: Tensor | None, added: bool) -> Tensor | None:
        """What a chunk's weights are multiplied with, or what is added to its logits over log 2.

        It broadcasts against [b, heads, groups, tiles * keys * queries]. None: nothing.
        """
        name = (id(chunk), unit.heads.start, added)
        if name in self._parts:
            return self._parts[name]
        made = self.plan.mask(chunk.number, self.repeats, added)
        if bias is not None:
            made = self._bias_table(bias, chunk, unit, added)
        part = None if made is None else self.of_chunk(made, chunk)
        flat = None if part is None else part.flatten(-3)
        if part is None or flat is None or flat.data_ptr() == part.data_ptr():  # no memory of its own
            self._parts[name] = flat
        return flat

    def _bias_table(self, bias: Tensor, chunk: Chunk, unit: _Unit, added: bool) -> Tensor:
        """The offset bias, [heads, groups or 1, tiles, keys, queries] of a loop tile, its exponential or over log 2."""
        cut = self.plan
        name = (cut.loop.kind[chunk.number], unit.heads.start, added)
        if name in self._tables:
            return self._tables[name]
        heads = slice(unit.heads.start * self.repeats, unit.heads.stop * self.repeats)
        taken = bias.flatten(1)[heads].to(self.dtype)
        taken = (taken * _LOG2E if added else taken.exp())[:, None, cut.offset(chunk.number)]
        taken = torch.where(cut.allowed(chunk.number), taken, -math.inf if added else 0.0)
        made = taken.unflatten(0, (-1, self.repeats)).movedim(1, -2).flatten(-2)
        made = made.index_select(2, cut.joined_kinds[1])
        if sum(table.numel() for table in self._tables.values()) + made.numel() <= _BIAS:
            self._tables[name] = made
        return made

    def index(self, table: Tensor, chunk: Chunk, matrices: int) -> Tensor:
        """A table [groups or 1, inner tiles, a, queries] of a chunk, for each matrix and query head."""
        part = self.of_chunk(table, chunk).repeat(1, 1, 1, self.repeats)
        return part.expand(matrices, chunk.shape[0], *part.shape[1:])

    def add_tables(self, logits: Tensor, chunk: Chunk, unit: _Unit, bias: Tensor | None, tiles: Tensor | None) -> None:
        """The bias and -inf where a query doesn't see a key, added to a chunk's logits over log 2.

        tiles: the query tiles of a bias by query, over log 2; of one batch entry where all share a bias.
        """
        if tiles is None:
            table = self.table(chunk, unit, bias, added=True)
            if table is not None:
                logits.view(*unit.shape, chunk.shape[0], -1).add_(table)
            return
        at = chunk.queries(tiles.unbind()).transpose(1, 2)
        matrices = unit.shape[1] * (unit.shape[0] if bias is not None and bias.shape[0] > 1 else 1)
        index = self.index(self.plan.slot(chunk.number), chunk, matrices)
        taken = at.reshape(matrices, *chunk.shape, *at.shape[1:]).gather(-2, index)
        mask = self.plan.mask(chunk.number, self.repeats, added=True)
        if mask is not None:
            taken.masked_fill_(self.of_chunk(mask, chunk) < 0, -math.inf)
        logits.view(-1, *taken.shape).add_(taken)

    def take_slots(self, grad: Tensor, goal: Tensor, chunk: Chunk, unit: _Unit) -> None:
        """The gradient of a chunk's logits [boxes, keys, queries] by window slot, into goal [boxes, queries, slots]."""
        at, present = self.plan.place(chunk.number)
        taken = self.whole(grad, chunk, unit.matrices).gather(-2, self.index(at, chunk, unit.matrices))
        taken *= self.index(present, chunk, unit.matrices)
        goal.copy_(taken.flatten(0, 2).transpose(1, 2))

    def put_bias(self, made: Tensor, whole: Tensor, unit: _Unit) -> None:
        """Add query tiles of slots to the gradient of a bias by query, [B or 1, *grid, heads, slots]."""
        if whole.shape[0] == 1:
            made = made.view(*self._shape(unit, True), made.shape[-1]).sum(1, keepdim=True)
            unit = _Unit(slice(0, 1), unit.heads)
        self.put(made, whole, unit, add=True)


class _Inputs:
    """A call's tensors, and their copies for one unit."""

    def __init__(self, call: _Call, tensors: tuple[Tensor | None, ...]) -> None:
        self.call = call
        query, key, value, self.bias, self.additional_keys, self.additional_values = tensors
        assert query is not None and key is not None and value is not None
        self.query, self.key, self.value = query, key, value

    def bounded(self) -> bool:
        """Whether the bias allows weights without a maximum."""
        if self.bias is None or self.bias.numel() == 0:
            return True
        if self.call.problem.bias == "query":
            return False
        least, most = self.bias.masked_fill(self.bias == -math.inf, 0.0).aminmax()
        return float(least) >= _BIASES[0] and float(most) <= _BIASES[1]

    def copy(self, unit: _Unit, values: bool = True) -> None:
        """Copy a unit's part into tiles and boxes."""
        call = self.call
        self.queries, self.keys = call.query_tiles("query", self.query, unit), call.key_boxes("key", self.key, unit)
        self.tiles = self.queries.unbind()
        self.values = call.key_boxes("value", self.value, unit) if values else self.keys
        self.far_key, self.far_value = self._far(unit, self.additional_keys), self._far(unit, self.additional_values)
        self.bias_tiles = None
        if self.bias is not None and call.problem.bias == "query":
            shared = _Unit(slice(0, 1), unit.heads) if self.bias.shape[0] == 1 else unit
            self.bias_tiles = call.query_tiles("bias", self.bias, shared).mul_(_LOG2E)

    def _far(self, unit: _Unit, tensor: Tensor | None) -> Tensor | None:
        """Additional keys or values [B, n, heads_kv, dim] as [b * heads_kv, n, dim]."""
        if tensor is None or tensor.shape[1] == 0:
            return None
        return tensor[unit.batch, :, unit.heads].transpose(1, 2).to(self.call.dtype).flatten(0, 1)

    def bounded_weights(
        self, unit: _Unit, chunk: Chunk, tiles: Tensor, clamp: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """exp(logits) of a chunk, [boxes, keys, queries], and of its additional keys, [matrices, n, queries].

        clamp: nothing has shown the logits of keys that are not seen to be small; they must not become infinite.
        """
        call, scale = self.call, self.call.problem.scale
        weights = call.product("logits", chunk.boxes(self.keys), tiles.transpose(1, 2), scale)
        table = call.table(chunk, unit, self.bias, added=False)
        if table is not None and clamp:
            weights.clamp_(max=2 * _SAFE)  # the others are below lse - bias
        weights.exp_()
        if table is not None:
            weights.view(*unit.shape, chunk.shape[0], -1).mul_(table)
        far = None
        if self.far_key is not None:
            far = call.product("far", self.far_key, self._flat(unit, tiles), scale).exp_()
        return weights, far

    def shifted_weights(
        self, unit: _Unit, chunk: Chunk, tiles: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """2 ** (logits / log 2 - shift) of a chunk and of its additional keys, shaped as above, and the shift.

        shift: [boxes, queries], the rows' largest logits where None. A row without keys has the shift 0.
        """
        call, scale = self.call, self.call.problem.scale * _LOG2E
        weights = call.product("logits", chunk.boxes(self.keys), tiles.transpose(1, 2), scale)
        call.add_tables(weights, chunk, unit, self.bias, self.bias_tiles)
        far = None
        if self.far_key is not None:
            far = call.product("far", self.far_key, self._flat(unit, tiles), scale)
        if shift is None:
            shift = weights.amax(-2)
            if far is not None:
                shift = torch.maximum(shift, far.amax(-2).view_as(shift))
        shift = shift.masked_fill(shift == -math.inf, 0.0)
        weights.sub_(shift[:, None]).exp2_()
        if far is not None:
            far.sub_(shift.reshape(unit.matrices, 1, -1)).exp2_()
        return weights, far, shift

    def _flat(self, unit: _Unit, tiles: Tensor) -> Tensor:
        """A chunk's query tiles as [matrices, dim, queries]."""
        return tiles.reshape(unit.matrices, -1, tiles.shape[-1]).transpose(1, 2)


def _unit_forward(inputs: _Inputs, unit: _Unit, bounded: bool, out: Tensor, lse: Tensor) -> bool:
    """out and lse of a unit; False, and nothing written, where the weights can't do without a maximum (`bounded`)."""
    call, shape = inputs.call, inputs.queries.shape[:-1]
    made, total = call.scratch("out", *shape, inputs.value.shape[-1]), call.scratch("total", *shape)
    highest = None if bounded else call.scratch("highest", *shape)
    goals, totals = made.unbind(), total.unbind()
    for chunk in call.chunks(unit):
        tiles = chunk.queries(inputs.tiles)
        if highest is None:
            weights, far = inputs.bounded_weights(unit, chunk, tiles)
        else:
            weights, far, shift = inputs.shifted_weights(unit, chunk, tiles)
            chunk.queries(highest).copy_(shift)
        goal, sums = chunk.queries(goals), chunk.queries(totals)
        torch.sum(weights, -2, out=sums)
        torch.bmm(weights.transpose(1, 2), chunk.boxes(inputs.values), out=goal)
        if far is not None and inputs.far_value is not None:
            sums += far.sum(-2).view_as(sums)
            goal += torch.bmm(far.transpose(1, 2), inputs.far_value).view_as(goal)
    if highest is None:
        least, most = total.aminmax()
        if not (float(least) >= math.exp(-_SAFE) and float(most) <= math.exp(_SAFE)):
            return False
    # a row without keys has total 0: its lse is log 0 = -inf, its output stays 0
    divisor = total if bounded else total.masked_fill(total == 0.0, 1.0)
    call.put(made, out, unit, divisor.reciprocal())
    logs = total.log_() if highest is None else total.log2_().add_(highest).mul_(_LN2)
    call.put(logs[..., None], lse[..., None], unit)
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
    call = _Call(problem, tile)
    inputs = _Inputs(call, (query, key, value, bias, additional_keys, additional_values))
    bounded = inputs.bounded()
    for unit in call.units():
        inputs.copy(unit)
        bounded = bounded and _unit_forward(inputs, unit, True, out, lse)
        if not bounded:
            _unit_forward(inputs, unit, False, out, lse)
    call.close()
    return out, lse


class _BiasGradient:
    """Sums the logits' gradients into an offset bias's."""

    def __init__(self, call: _Call, bias: Tensor) -> None:
        self.call, self.bias = call, bias
        self.total = torch.zeros(bias.shape, dtype=call.dtype)
        self.sums: dict[tuple[int, int], tuple[int, Tensor]] = {}

    def add(self, grad: Tensor, unit: _Unit, chunk: Chunk) -> None:
        """grad: a chunk's [boxes, keys, queries]; the sums are [heads_kv, kinds, keys, repeats * queries]."""
        cut = self.call.plan
        name, (samples, kinds) = (cut.loop.kind[chunk.number], unit.heads.start), cut.joined_kinds
        if name not in self.sums:
            shape = (unit.shape[1], len(samples), *grad.shape[1:])
            if sum(kept.numel() for _, kept in self.sums.values()) + math.prod(shape) > _BIAS:
                self.flush()
            self.sums[name] = (chunk.number, torch.zeros(shape, dtype=grad.dtype))
        whole = self.call.whole(grad, chunk, unit.matrices).unflatten(0, unit.shape)
        self.sums[name][1].index_add_(1, kinds[chunk.tiles], whole.sum((0, 2)))

    def flush(self) -> None:
        """Empty the sums into the table of offsets."""
        table, call = self.total.flatten(1), self.call
        for (_, first), (number, summed) in self.sums.items():
            index = call.plan.offset(number).flatten()
            by_head = summed.unflatten(-1, (call.repeats, -1)).movedim(-2, 1).flatten(0, 1).flatten(1)
            for head, weights in enumerate(by_head, first * call.repeats):
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

    bounded: weights are exp(logit), and the output's gradient and delta are multiplied with exp(-lse) instead.
    """
    call, problem = inputs.call, inputs.call.problem
    given = call.query_tiles("grad", grad_out, unit)
    deltas = None if delta is None else call.query_tiles("delta", delta[..., None], unit)
    logs = call.query_tiles("lse", lse[..., None], unit)
    if bounded:
        inverse = logs.neg_().exp_()
        given.mul_(inverse)
        if deltas is not None:
            deltas.mul_(inverse)
    else:
        logs.mul_(_LOG2E)
    d_query = call.scratch("d_query", *inputs.queries.shape) if grads.query is not None else None
    boxes = inputs.keys.shape[:2]
    d_key = call.scratch("d_key", *boxes, problem.head_dim).zero_() if grads.key is not None else None
    d_value = call.scratch("d_value", *boxes, problem.head_dim_v).zero_() if grads.value is not None else None
    d_bias = None
    if grads.bias is not None and inputs.bias_tiles is not None:
        d_bias = call.scratch("d_bias", *inputs.queries.shape[:-1], inputs.bias_tiles.shape[-1])
    all_grads, all_logs = given.unbind(), logs[..., 0].unbind()
    all_deltas = None if deltas is None else deltas.unbind()
    goals = None if d_query is None else d_query.unbind()
    for chunk in call.chunks(unit):
        tiles, grad, keys = chunk.queries(inputs.tiles), chunk.queries(all_grads), chunk.boxes(inputs.keys)
        if bounded:
            weights, far = inputs.bounded_weights(unit, chunk, tiles, clamp=True)
        else:
            weights, far, _ = inputs.shifted_weights(unit, chunk, tiles, chunk.queries(all_logs))
        if d_value is not None:
            chunk.boxes(d_value).add_(call.product("d_box", weights, grad))
        shift = None
        if all_deltas is not None:
            shift = chunk.queries(all_deltas)
            d_logits = call.product("d_logits", chunk.boxes(inputs.values), grad.transpose(1, 2))
            d_logits.sub_(shift.transpose(1, 2)).mul_(weights)
            if d_bias is not None:
                call.take_slots(d_logits, chunk.queries(d_bias.unbind()), chunk, unit)
            elif grads.bias is not None:
                grads.bias.add(d_logits, unit, chunk)
            if goals is not None:
                torch.bmm(d_logits.transpose(1, 2), keys, out=chunk.queries(goals))
            if d_key is not None:
                chunk.boxes(d_key).add_(call.product("d_box", d_logits, tiles))
        if far is None or inputs.far_key is None or inputs.far_value is None:
            continue
        far_query, far_grad = (t.reshape(unit.matrices, -1, t.shape[-1]) for t in (tiles, grad))
        if grads.additional_values is not None:
            _add_far(grads.additional_values, torch.bmm(far, far_grad), unit)
        if shift is not None:
            d_far = call.product("d_far", inputs.far_value, far_grad.transpose(1, 2))
            d_far.sub_(shift.reshape(unit.matrices, 1, -1)).mul_(far)
            if goals is not None:
                part = chunk.queries(goals)
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
    call, dtype = _Call(problem, tile), problem.compute_dtype

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
        delta = torch.linalg.vecdot(grad_out.to(dtype), out.to(dtype))
        if grad_lse is not None:
            delta -= grad_lse
    inputs = _Inputs(call, tensors)
    least, most = lse.aminmax() if lse.numel() else (0.0, 0.0)
    bounded = inputs.bounded() and -_SAFE <= float(least) and float(most) <= _SAFE
    for unit in call.units():
        inputs.copy(unit, values=delta is not None)
        _unit_backward(inputs, unit, bounded, grads, grad_out, lse, delta)
    call.close()
    if grads.bias is not None:
        grads.bias.flush()
    found = (grads.query, grads.key, grads.value, None if grads.bias is None else grads.bias.total)
    found += (grads.additional_keys, grads.additional_values)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, tensors, strict=True)
    )
