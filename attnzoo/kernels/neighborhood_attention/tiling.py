"""How the CPU path cuts a grid: tiles of queries, each with the smallest box of keys that holds all its windows.

The last axis is cut into columns: plain slices of the tensors, every column with its own width. The axes before it are
cut into row tiles of one size: lists of row numbers (a row is one index over all leading axes), the last tile of a
dilation group filled up by repeating its last query. Along a leading axis that its dilation divides, rows are numbered
group by group (`Axis.row_shape`), so that a group's rows lie together in what is copied anyway. A tile never spans two
dilation groups, so its box has no holes.
For border "zero" the keys are padded once by kernel_size - 1 positions per dilation group and axis (`Plan.padding`),
after which no window leaves the grid. A one-dimensional grid gets a last axis of size 1.

Some windows need no tiles: they cut the grid into cells whose tokens see exactly each other (`cells`). That is block
attention (stride = kernel_size), grid attention, and DiNAT's widest dilation (kernel_size * dilation = size).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention.problem import Problem, axis_windows

# Measured on one AVX-512 core at head_dim 32, in multiples of the time one query-key pair takes (bmm, softmax, bmm;
# about 3 ns): what a tile costs by being one, and what a key costs by being copied into a tile.
_TILE_COST = 1700.0
_KEY_COST = 10.0
_SIZES = (1, 2, 3, 4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)


@dataclass(frozen=True)
class Axis:
    """What a plan needs to know of one axis."""

    size: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool
    border: str

    @property
    def before(self) -> int:
        """Zero keys to put before each dilation group."""
        return self.kernel_size // 2 if self.border == "zero" and not self.is_causal else 0

    @property
    def after(self) -> int:
        """Zero keys to put after each dilation group."""
        return (self.kernel_size - 1) // 2 if self.border == "zero" and not self.is_causal else 0

    @property
    def key_size(self) -> int:
        """Keys along the axis, the zero ones included."""
        return self.size + self.dilation * (self.before + self.after)

    def row_shape(self, size: int) -> tuple[int, ...]:
        """The axis, `size` long, in the order of row numbers: (dilation, size // dilation) where that divides."""
        regrouped = self.dilation > 1 and size % self.dilation == 0
        return (self.dilation, size // self.dilation) if regrouped else (size,)

    def row_number(self, coordinate: Tensor, size: int) -> Tensor:
        """Where a coordinate stands in that order."""
        if len(self.row_shape(size)) == 1:
            return coordinate
        return coordinate % self.dilation * (size // self.dilation) + coordinate // self.dilation


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis: T queries and W keys each. Positions count from the first (padded) key of a dilation group."""

    axis: Axis
    query: Tensor  # [tiles, T] coordinates; a group's last tile repeats its last query
    valid: Tensor  # [tiles, T] False for the repeats
    key: Tensor  # [tiles, W] coordinates in the padded axis
    first: Tensor  # [tiles] position of the box's first key
    position: Tensor  # [tiles, T] the query's own position
    start: Tensor  # [tiles, T] position of its window's slot 0
    low: Tensor  # [tiles, T] first and
    high: Tensor  # [tiles, T] last position that takes part
    inverse: Tensor  # [size] where in the flattened `query` a coordinate stands

    def keys_of(self, tiles: Tensor) -> Tensor:
        """[tiles, 1, W] key positions of the given tiles' boxes."""
        return self.first[tiles, None, None] + torch.arange(self.key.shape[1])

    def allowed(self, tiles: Tensor) -> Tensor:
        """[tiles, T, W]: the query sees the key."""
        keys = self.keys_of(tiles)
        return (keys >= self.low[tiles, :, None]) & (keys <= self.high[tiles, :, None])

    def offset(self, tiles: Tensor) -> Tensor:
        """[tiles, T, W]: index into an offset bias along this axis, clamped where the key is not seen."""
        last = 2 * self.axis.kernel_size - 2
        return (self.keys_of(tiles) - self.position[tiles, :, None] + self.axis.kernel_size - 1).clamp_(0, last)

    def slot(self, tiles: Tensor) -> Tensor:
        """[tiles, T, W]: window slot of the key, clamped where it is not seen."""
        return (self.keys_of(tiles) - self.start[tiles, :, None]).clamp_(0, self.axis.kernel_size - 1)

    def place(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """[tiles, T, K]: where in the box each slot's key stands (clamped), and whether the slot takes part."""
        slots = self.start[tiles, :, None] + torch.arange(self.axis.kernel_size)
        present = (slots >= self.low[tiles, :, None]) & (slots <= self.high[tiles, :, None])
        return (slots - self.first[tiles, None, None]).clamp_(0, self.key.shape[1] - 1), present


@lru_cache(maxsize=512)
def axis_tiles(axis: Axis, tile: int) -> AxisTiles:
    """The axis in tiles of `tile` queries (fewer where no dilation group has as many)."""
    windows = axis_windows(axis.size, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal, axis.border)
    coordinates: list[Tensor] = []
    valid: list[Tensor] = []
    lengths: list[Tensor] = []
    tile = min(tile, -(-axis.size // axis.dilation))
    for group in range(min(axis.dilation, axis.size)):
        count = -(-(axis.size - group) // axis.dilation)
        at = torch.arange(-(-count // tile) * tile)
        coordinates.append(group + axis.dilation * at.clamp(max=count - 1))
        valid.append(at < count)
        lengths.append(torch.full((len(at) // tile,), count + axis.before + axis.after))
    query, is_valid = torch.cat(coordinates).view(-1, tile), torch.cat(valid).view(-1, tile)
    length = torch.cat(lengths)
    low, high = windows.low[query] + axis.before, windows.high[query] + axis.before
    width = int((high.amax(1) - low.amin(1)).amax()) + 1
    first = torch.minimum(low.amin(1), (length - width).clamp(min=0))
    key = torch.minimum(first[:, None] + torch.arange(width), length[:, None] - 1)
    inverse = torch.empty(axis.size, dtype=torch.long)
    inverse[query[is_valid]] = torch.arange(query.numel()).view_as(query)[is_valid]
    return AxisTiles(
        axis,
        query,
        is_valid,
        windows.group[query[:, :1]] + axis.dilation * key,
        first,
        windows.position[query] + axis.before,
        windows.start[query] + axis.before,
        low,
        high,
        inverse,
    )


@dataclass(frozen=True)
class Column:
    """One column of the last axis: slices of the tensors, and what the queries in it see of its keys."""

    queries: slice
    keys: slice
    num_queries: int
    num_keys: int
    kind: int  # columns of one kind have equal tables
    allowed: Tensor  # [T, W]
    offset: Tensor
    slot: Tensor
    place: Tensor  # [T, K]
    present: Tensor


@dataclass(frozen=True)
class Plan:
    """A grid cut into columns and row tiles; see the module's text."""

    rows: tuple[AxisTiles, ...]
    columns: tuple[Column, ...]
    query: Tensor  # [row tiles, rows] row numbers
    valid: Tensor
    key: Tensor  # [row tiles, key rows] row numbers in the padded grid
    inverse: Tensor  # [grid rows]
    in_order: bool  # row tiles follow each other without repeats
    keys_in_order: bool  # row tiles' keys do too, without overlap
    disjoint: bool  # every key of the last axis is in exactly one column
    padding: tuple[int, ...]  # zero keys before and after each axis, as torch.nn.functional.pad counts, last axis first
    key_grid: tuple[int, ...]
    masks: dict[tuple[int, int, int], Tensor | None] = field(default_factory=dict)

    def _split(self, first: int, last: int) -> list[Tensor]:
        """The given row tiles' numbers along each leading axis."""
        return list(torch.unravel_index(torch.arange(first, last), [len(axis.first) for axis in self.rows]))

    def _cross(self, tables: list[Tensor], scales: list[int]) -> Tensor:
        """Tables [tiles, a, b] of the leading axes as one [tiles, prod(a), prod(b)], mixed-radix in `scales`."""
        joined = tables[0]
        for table, scale in zip(tables[1:], scales[1:]):
            grown = joined[:, :, None, :, None] * scale + table[:, None, :, None, :]
            joined = grown.flatten(3, 4).flatten(1, 2)
        return joined

    def _full(self, rows: Tensor, column: Tensor, scale: int) -> Tensor:
        """Rows' table [tiles, a, b] and a column's [c, d] as [tiles, a * c, b * d]."""
        return (rows[:, :, None, :, None] * scale + column[None, None, :, None, :]).flatten(3, 4).flatten(1, 2)

    def allowed(self, first: int, last: int, column: Column) -> Tensor:
        """[tiles, queries, keys] of the row tiles first .. last - 1 in one column: the query sees the key."""
        tables = [axis.allowed(tiles).long() for axis, tiles in zip(self.rows, self._split(first, last))]
        rows = tables[0]
        for table in tables[1:]:
            rows = (rows[:, :, None, :, None] & table[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        return (rows.bool()[:, :, None, :, None] & column.allowed[None, None, :, None, :]).flatten(3, 4).flatten(1, 2)

    def mask(self, first: int, last: int, column: Column) -> Tensor | None:
        """0 where `allowed`, -inf elsewhere, float32; None where all is allowed. Small ones are kept."""
        name = (first, last, column.kind)
        if name in self.masks:
            return self.masks[name]
        allowed = self.allowed(first, last, column)
        mask = None if bool(allowed.all()) else torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)
        if sum(m.numel() for m in list(self.masks.values()) if m is not None) + allowed.numel() <= 1 << 22:
            self.masks[name] = mask
        return mask

    def offset(self, first: int, last: int, column: Column) -> Tensor:
        """[tiles, queries, keys]: linear index into an offset bias."""
        tables = [axis.offset(tiles) for axis, tiles in zip(self.rows, self._split(first, last))]
        rows = self._cross(tables, [2 * axis.axis.kernel_size - 1 for axis in self.rows])
        return self._full(rows, column.offset, 2 * column.place.shape[1] - 1)

    def slot(self, first: int, last: int, column: Column) -> Tensor:
        """[tiles, queries, keys]: the window slot."""
        tables = [axis.slot(tiles) for axis, tiles in zip(self.rows, self._split(first, last))]
        rows = self._cross(tables, [axis.axis.kernel_size for axis in self.rows])
        return self._full(rows, column.slot, column.place.shape[1])

    def place(self, first: int, last: int, column: Column) -> tuple[Tensor, Tensor]:
        """[tiles, queries, slots]: where among the tile's keys each slot's key stands, and whether it takes part."""
        found = [axis.place(tiles) for axis, tiles in zip(self.rows, self._split(first, last))]
        at = self._cross([place for place, _ in found], [axis.key.shape[1] for axis in self.rows])
        rows = found[0][1].long()
        for _, table in found[1:]:
            rows = (rows[:, :, None, :, None] * table.long()[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        present = (
            (rows[:, :, None, :, None] * column.present.long()[None, None, :, None, :]).flatten(3, 4).flatten(1, 2)
        )
        return self._full(at, column.place, column.num_keys), present.bool()


def _columns(tiles: AxisTiles) -> tuple[Column, ...]:
    """The tiles of the last axis as slices without repeats."""
    kinds: dict[tuple, int] = {}
    columns, step = [], tiles.axis.dilation
    for number in range(len(tiles.first)):
        index = torch.tensor([number])
        count = int(tiles.valid[number].sum())
        low, high = int(tiles.low[number, :count].amin()), int(tiles.high[number, :count].amax())
        begin = low - int(tiles.first[number])
        keys = slice(begin, begin + high - low + 1)
        allowed, offset, slot = (
            t[0, :count, keys].contiguous() for t in (tiles.allowed(index), tiles.offset(index), tiles.slot(index))
        )
        place, present = (t[0, :count] for t in tiles.place(index))
        place = (place - begin).clamp(0, high - low)
        name = (
            count,
            high - low,
            *(bytes(t.byte().numpy()) for t in (allowed, present)),
            tuple(offset.flatten().tolist()),
        )
        query, key = tiles.query[number, :count], tiles.key[number, keys]
        columns.append(
            Column(
                slice(int(query[0]), int(query[-1]) + 1, step),
                slice(int(key[0]), int(key[-1]) + 1, step),
                count,
                high - low + 1,
                kinds.setdefault(name, len(kinds)),
                allowed,
                offset,
                slot,
                place.contiguous(),
                present.contiguous(),
            )
        )
    return tuple(columns)


def _tile_shape(axes: tuple[Axis, ...], head_dim: int) -> tuple[int, ...]:
    """The tile that the cost model likes best."""
    weight = head_dim / 32

    def options(axis: Axis) -> list[tuple[int, int, int]]:
        longest = -(-axis.size // axis.dilation)
        found = []
        for size in sorted({min(size, longest) for size in _SIZES}):
            tiles = axis_tiles(axis, size)
            found.append((size, *tiles.key.shape))
        return found

    best, shape = math.inf, (1,) * len(axes)
    for choice in itertools.product(*(options(axis) for axis in axes)):
        queries, tiles, keys = (math.prod(part) for part in zip(*choice))
        cost = tiles * (_TILE_COST + queries * keys * (0.3 + 0.7 * weight) + _KEY_COST * weight * keys)
        if cost < best:
            best, shape = cost, tuple(part[0] for part in choice)
    return shape


@lru_cache(maxsize=128)
def _plan(axes: tuple[Axis, ...], head_dim: int, tile: tuple[int, ...] | None) -> Plan:
    shape = tile or _tile_shape(axes, head_dim)
    rows = tuple(axis_tiles(axis, size) for axis, size in zip(axes[:-1], shape))
    query = key = inverse = torch.zeros(1, 1, dtype=torch.long)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for tiles in rows:
        axis, (count, per_tile), each = tiles.axis, tiles.query.shape, query.shape[1]
        own = torch.empty_like(tiles.inverse)
        own[axis.row_number(torch.arange(axis.size), axis.size)] = tiles.inverse
        inverse = inverse.view(-1, 1)
        tile_number = inverse // each * count + own // per_tile
        inverse = (tile_number * each + inverse % each) * per_tile + own % per_tile
        query_row, key_row = axis.row_number(tiles.query, axis.size), axis.row_number(tiles.key, axis.key_size)
        query = (query[:, None, :, None] * axis.size + query_row[None, :, None]).flatten(2).flatten(0, 1)
        valid = (valid[:, None, :, None] & tiles.valid[None, :, None]).flatten(2).flatten(0, 1)
        key = (key[:, None, :, None] * axis.key_size + key_row[None, :, None]).flatten(2).flatten(0, 1)
    lead = [axis.key_size for axis in axes[:-1]]
    padding = tuple(
        amount for axis in reversed(axes) for amount in (axis.dilation * axis.before, axis.dilation * axis.after)
    )
    columns = _columns(axis_tiles(axes[-1], shape[-1]))
    seen = sorted(at for column in columns for at in range(*column.keys.indices(axes[-1].key_size)))
    return Plan(
        rows,
        columns,
        query,
        valid,
        key,
        inverse.flatten(),
        query.numel() == inverse.numel() and bool((query.flatten() == torch.arange(query.numel())).all()),
        bool((key.flatten() == torch.arange(key.numel())).all()) and int(key[-1, -1]) == math.prod(lead) - 1,
        seen == list(range(axes[-1].key_size)),
        padding,
        tuple(axis.key_size for axis in axes),
    )


def plan(problem: Problem, tile: tuple[int, ...] | None = None) -> Plan:
    """The cut for `problem`; `tile` (queries per axis) overrides the cost model."""
    axes = [
        Axis(size, kernel_size, stride, dilation, is_causal, problem.border)
        for size, kernel_size, stride, dilation, is_causal in zip(
            problem.grid, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal
        )
    ]
    if len(axes) == 1:
        axes.append(Axis(1, 1, 1, 1, False, "shift"))
        tile = None if tile is None else (*tile, 1)
    return _plan(tuple(axes), max(problem.head_dim, problem.head_dim_v), tile)


@dataclass(frozen=True)
class Cells:
    """A grid whose windows are cells: `count` of them, of `size` tokens each."""

    shape: tuple[tuple[int, int, int], ...]  # per axis: blocks, kernel_size, dilation
    count: int
    size: int
    offset: Tensor  # [size, size] index into an offset bias, query by key

    def view(self, tensor: Tensor) -> Tensor:
        """[B, *grid, heads, dim] as [B, *blocks, *dilation, heads, *kernel_size, dim], without a copy."""
        rank = len(self.shape)
        for axis in range(rank, 0, -1):
            tensor = tensor.unflatten(axis, self.shape[axis - 1])
        blocks, tokens, groups = (range(first, 3 * rank + 1, 3) for first in (1, 2, 3))
        return tensor.permute(0, *blocks, *groups, -2, *tokens, -1)


def cells(problem: Problem) -> Cells | None:
    """The cells that `problem`'s windows are, or None where they overlap or are cut off."""
    for size, kernel_size, stride, dilation, is_causal in zip(
        problem.grid, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal
    ):
        one_window = size == kernel_size * dilation and problem.border == "shift"
        if is_causal or size % (kernel_size * dilation) or not (stride == kernel_size or one_window):
            return None
    return _cells(problem.grid, problem.kernel_size, problem.dilation)


@lru_cache(maxsize=128)
def _cells(grid: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]) -> Cells:
    offset = torch.zeros(1, 1, dtype=torch.long)
    for k in kernel_size:
        position = torch.arange(k)
        own = position - position[:, None] + k - 1
        offset = (offset[:, None, :, None] * (2 * k - 1) + own[None, :, None, :]).flatten(2).flatten(0, 1)
    shape = tuple((n // (k * d), k, d) for n, k, d in zip(grid, kernel_size, dilation))
    size = math.prod(kernel_size)
    return Cells(shape, math.prod(grid) // size, size, offset)
