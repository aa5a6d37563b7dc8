"""How the CPU path cuts a grid: tiles of queries, each with the smallest box of keys that holds all its windows.

Every axis is cut into dilation groups and a group into tiles of one length, so that a box has no holes. Along the
inner axes the boxes overlap and are copied with the overlap. Along the loop axis (the first) keys are copied once: the
boxes of consecutive tiles begin a tile's length apart in that copy, and so do those of consecutive strips (all tiles
along the loop axis), so that any run of tiles is one batch of overlapping matrices. What is copied has the layout

    queries  [B, heads_kv, *groups, *inner tiles, loop tiles, heads per key head, *queries of a tile per axis, dim]
    keys     [B, heads_kv, *groups, *inner tiles, keys of the loop axis, *keys of a box per inner axis, dim]

A box at the end of a strip may reach into the next one, at places that no query of it sees. Copies go piece by piece
(`Move`): rectangles whose coordinates advance evenly, which a strided view reads or writes. Places without a token
(keys outside the grid, queries beyond a group's end) hold zeros; for border "zero" these are the zero keys that take
softmax mass.

Tiles whose queries see the same places of their box are of one kind (`AxisTiles.kind`), and share tables.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.neighborhood_attention.problem import Problem, axis_windows

# Fitted to times on one AVX-512 core, in nanoseconds: a product's part per query-key pair and head dim (queries are
# multiplied _LANES at a time), the softmax's per pair, a key's or query's copies per element, a tile's two products and
# a chunk's calls by being some.
_PRODUCT_COST = 0.0125
_SOFTMAX_COST = 0.35
_COPY_COST = 0.25
_TILE_COST = 250.0
_CHUNK_COST = 20000.0
_LANES = 16
_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
CHUNK = 3 << 17  # query-key pairs that are worked on at a time
_KEPT = 1 << 21  # elements of tables that a plan may keep
_numbers = itertools.count()


@dataclass(frozen=True)
class Axis:
    """What a plan needs to know of one axis."""

    size: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False
    border: str = "shift"

    @property
    def groups(self) -> int:
        """Dilation groups that have a member."""
        return min(self.dilation, self.size)

    def length(self, group: int) -> int:
        """Members of a dilation group."""
        return -(-(self.size - group) // self.dilation)


@dataclass(frozen=True)
class Box:
    """Part of an axis's cut [groups, tiles, places] whose coordinates advance evenly.

    The coordinate of (group, tile, place), counted from the box's first, is first + group + step * tile + dilation *
    place.
    """

    groups: slice
    tiles: slice
    places: slice
    first: int
    step: int
    dilation: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, tiles and places."""
        groups, tiles, places = (part.stop - part.start for part in (self.groups, self.tiles, self.places))
        return groups, tiles, places

    def within(self, groups: slice, tiles: slice) -> Box | None:
        """The part of it in ranges of groups and tiles."""
        kept = []
        for own, wanted in ((self.groups, groups), (self.tiles, tiles)):
            kept.append(slice(max(own.start, wanted.start), min(own.stop, wanted.stop)))
            if kept[-1].start >= kept[-1].stop:
                return None
        first = self.first + kept[0].start - self.groups.start + self.step * (kept[1].start - self.tiles.start)
        return replace(self, groups=kept[0], tiles=kept[1], first=first)

    def disjoint(self) -> list[Box]:
        """The same tokens in boxes that hold none twice."""
        step = self.step // self.dilation  # places from tile to tile
        count = self.shape[1]
        if count > 1 and step == 0:
            ends = range(self.tiles.start, self.tiles.stop)
            return [box for at in ends if (box := self.within(self.groups, slice(at, at + 1))) is not None]
        length = step if count > 1 else max(1, self.shape[2])
        return [
            replace(
                self,
                places=slice(place, min(place + length, self.places.stop)),
                first=self.first + self.dilation * (place - self.places.start),
            )
            for place in range(self.places.start, self.places.stop, length)
        ]

    def coordinates(self) -> Iterator[int]:
        """The coordinates of all its tokens."""
        for group, tile, place in itertools.product(*map(range, self.shape)):
            yield self.first + group + self.step * tile + self.dilation * place


def boxes(axis: Axis, first: list[int], width: int) -> list[Box]:
    """The tokens of an axis cut into `width` places from position first[tile] on, of every dilation group.

    Without the places that lie outside the grid.
    """
    found = []
    shorter = axis.size % axis.dilation if axis.size > axis.dilation else 0  # from this group on, a member fewer
    for begin, end in ((0, shorter), (shorter, axis.groups)):
        length, tile = axis.length(begin), 0
        inside = [(max(0, -at), min(width, length - at)) for at in first]
        while tile < len(first) and begin < end:
            last = tile + 1
            step = first[last] - first[tile] if last < len(first) else 0
            while last < len(first) and inside[last] == inside[tile] and first[last] - first[last - 1] == step:
                last += 1
            low, high = inside[tile]
            if low < high:
                at = begin + axis.dilation * (first[tile] + low)
                places, tiles = slice(low, high), slice(tile, last)
                found.append(Box(slice(begin, end), tiles, places, at, axis.dilation * step, axis.dilation))
            tile = last
    return found


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis: T queries and a box of W keys each. Positions count within a dilation group.

    Tables hold one group where all groups have the same.
    """

    axis: Axis
    first: list[int]  # position of each box's first key; on the loop axis a tile's length apart, and maybe below 0
    width: int  # W
    position: Tensor  # [tiles, T] of the queries
    start: (
        Tensor  # [groups, tiles, T] position of the window's slot 0; beyond a group's end its last query stands again
    )
    low: Tensor  # [groups, tiles, T] first and
    high: Tensor  # [groups, tiles, T] last position that takes part
    kind: list[int]  # tiles of one kind have equal tables

    @property
    def tile(self) -> int:
        """T, the queries of a tile."""
        return self.position.shape[1]

    @property
    def count(self) -> int:
        """Tiles of a group."""
        return len(self.first)

    def _keys(self, tiles: list[int]) -> Tensor:
        """[tiles, W, 1] key positions of the given tiles' boxes."""
        return self._first(tiles) + torch.arange(self.width)[:, None]

    def _first(self, tiles: list[int]) -> Tensor:
        """[tiles, 1, 1] position of the boxes' first keys."""
        return torch.tensor([self.first[tile] for tile in tiles])[:, None, None]

    def allowed(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, W, T]: the query sees the key."""
        keys = self._keys(tiles)
        return (keys >= self.low[:, tiles, None]) & (keys <= self.high[:, tiles, None])

    def offset(self, tiles: list[int]) -> Tensor:
        """[1, tiles, W, T]: index into an offset bias along this axis, clamped where the key is not seen."""
        relative = self._keys(tiles) - self.position[tiles, None] + self.axis.kernel_size - 1
        return relative.clamp_(0, 2 * self.axis.kernel_size - 2)[None]

    def slot(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, W, T]: window slot of the key, clamped where it is not seen."""
        return (self._keys(tiles) - self.start[:, tiles, None]).clamp_(0, self.axis.kernel_size - 1)

    def _slots(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, K, T]: positions of the windows' slots."""
        return self.start[:, tiles, None] + torch.arange(self.axis.kernel_size)[:, None]

    def place(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, K, T]: where in the box each slot's key stands, clamped where the slot takes no part."""
        return (self._slots(tiles) - self._first(tiles)).clamp_(0, self.width - 1)

    def present(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, K, T]: the slot takes part."""
        slots = self._slots(tiles)
        return (slots >= self.low[:, tiles, None]) & (slots <= self.high[:, tiles, None])


@lru_cache(maxsize=512)
def axis_tiles(axis: Axis, tile: int, inner: bool) -> AxisTiles:
    """The axis in tiles of `tile` queries (fewer where no dilation group has as many), on the loop axis or an inner."""
    windows = axis_windows(axis.size, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal, axis.border)
    longest = axis.length(0)
    tile = min(tile, longest)
    count = -(-longest // tile)
    lengths = torch.tensor([axis.length(group) for group in range(axis.groups)])[:, None]
    position = torch.arange(count * tile)
    coordinate = torch.arange(axis.groups)[:, None] + axis.dilation * torch.minimum(position, lengths - 1)
    tables = [table[coordinate].view(-1, count, tile) for table in (windows.start, windows.low, windows.high)]
    lowest, highest = tables[1].amin((0, 2)), tables[2].amax((0, 2))
    if inner:  # at the end a box of full width moves inward, so that fewer of its places lie outside the grid
        width = int((highest - lowest + 1).amax())
        first = torch.minimum(lowest, torch.maximum(highest.amax() + 1 - width, lowest.amin()))
    else:
        evenly = torch.arange(count) * tile
        first = evenly + (lowest - evenly).amin()
        width = int((highest - first + 1).amax())
    if all(bool((table == table[:1]).all()) for table in tables):
        tables = [table[:1] for table in tables]
    position = position.view(count, tile)
    relative = [(table - first[:, None]).transpose(0, 1).flatten(1) for table in (*tables, position[None])]
    names: dict[tuple[int, ...], int] = {}
    kind = [names.setdefault(tuple(row), len(names)) for row in torch.cat(relative, 1).tolist()]
    start, low, high = tables
    return AxisTiles(axis, first.tolist(), width, position, start, low, high, kind)


@dataclass(frozen=True)
class Move:
    """A rectangle of tokens, as strided views of a tensor and of its copy (both of shape `sizes`, dim last).

    Offsets count from the tensor's part for one unit, and from the copy's begin. factor_strides: of one number per
    token, in the copy's order.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    copy_strides: tuple[int, ...]
    copy_offset: int
    factor_strides: tuple[int, ...]
    factor_offset: int

    def of_copy(self, copy: Tensor) -> Tensor:
        """The copy's view."""
        return copy.as_strided(self.sizes, self.copy_strides, copy.storage_offset() + self.copy_offset)

    def of_factor(self, factor: Tensor) -> Tensor:
        """The view of one number per token."""
        return factor.as_strided(self.sizes, self.factor_strides, factor.storage_offset() + self.factor_offset)


@dataclass(frozen=True)
class Region:
    """The groups and inner tiles that are copied together: a range per axis each."""

    number: int  # no other region's
    groups: tuple[slice, ...]
    tiles: tuple[slice, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Groups per axis, then tiles per inner axis."""
        return tuple(part.stop - part.start for part in (*self.groups, *self.tiles))


@dataclass(frozen=True)
class Plan:
    """A grid cut into tiles; see the module's text. The loop axis comes first; it may be one of size 1 of its own."""

    loop: AxisTiles
    inner: tuple[AxisTiles, ...]
    own_loop: bool  # the grid has no axis for the loop
    key_once: bool  # every key is copied to exactly one place
    _kept: dict[tuple, Any] = field(default_factory=dict)
    number: int = field(default_factory=lambda: next(_numbers))  # no other plan's or region's

    @cached_property
    def axes(self) -> tuple[AxisTiles, ...]:
        """All axes, the loop first."""
        return (self.loop, *self.inner)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """Dilation groups per axis."""
        return tuple(tiles.axis.groups for tiles in self.axes)

    @cached_property
    def one_group(self) -> bool:
        """Whether tables are the same for all groups."""
        return all(len(tiles.low) == 1 for tiles in self.axes)

    @cached_property
    def strip(self) -> int:
        """Keys of the loop axis that are copied per strip: whole tiles."""
        return self.loop.count * self.loop.tile

    @cached_property
    def row(self) -> int:
        """Keys of a strip or box per key of the loop axis."""
        return math.prod(tiles.width for tiles in self.inner)

    @cached_property
    def queries(self) -> int:
        """Queries of a tile."""
        return math.prod(tiles.tile for tiles in self.axes)

    @cached_property
    def keys(self) -> int:
        """Keys of a box."""
        return self.loop.width * self.row

    @cached_property
    def margin(self) -> tuple[int, int]:
        """Keys of the loop axis that boxes read before the first strip and after the last."""
        first = self.loop.first
        return max(0, -first[0]), max(0, first[-1] + self.loop.width - self.strip)

    @cached_property
    def closed(self) -> bool:
        """Whether every query sees all keys of its box, as in cells of tokens that attend among themselves."""
        return all(bool(tiles.allowed(list(range(tiles.count))).all()) for tiles in self.axes)

    def regions(self, most: int) -> tuple[Region, ...]:
        """All groups and inner tiles in regions of about `most` strips, at least one."""
        name = ("regions", most)
        if name not in self._kept:
            counts = [*self.groups, *(tiles.count for tiles in self.inner)]
            steps, rest = [], math.prod(counts)
            for count in counts:
                rest //= count
                parts = -(-count // max(1, min(count, most // rest)))
                steps.append(-(-count // parts))
            ranges = [
                [slice(at, min(at + step, count)) for at in range(0, count, step)] for count, step in zip(counts, steps)
            ]
            rank = len(self.axes)
            cuts = itertools.product(*ranges)
            self._kept[name] = tuple(Region(next(_numbers), cut[:rank], cut[rank:]) for cut in cuts)
        return self._kept[name]

    def moves(
        self, what: str, region: Region, lead: tuple[int, ...], strides: tuple[int, ...], dim: int
    ) -> tuple[tuple[Move, ...], bool]:
        """How a region of a tensor [B, *grid, heads, dim] is copied, and whether every place of the copy has a token.

        what: "queries", "keys", or "sums", which are keys' moves that hold no token twice. lead: batch entries, key
        heads, query heads per key head (1 for keys). strides: the tensor's.
        """
        found = tuple(self._moves(what, region, lead, strides, dim))
        places = math.prod(self.copy_shape(what == "queries", region, lead)) * dim
        return found, sum(math.prod(move.sizes) for move in found) == places

    def copy_shape(self, queries: bool, region: Region, lead: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a region's copy, but for the last dimension."""
        if queries:
            return (*lead[:2], *region.shape, self.loop.count, lead[2], *(tiles.tile for tiles in self.axes))
        return (*lead[:2], *region.shape, self.strip, *(tiles.width for tiles in self.inner))

    def _moves(
        self, what: str, region: Region, lead: tuple[int, ...], strides: tuple[int, ...], dim: int
    ) -> Iterator[Move]:
        queries = what == "queries"
        shape = self.copy_shape(queries, region, lead)
        steps = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
        batch, *axes, heads, last = strides
        if self.own_loop:
            axes.insert(0, 0)
        begins = [part.start for part in (*region.groups, *region.tiles)]
        for boxes_of in itertools.product(*self._boxes(what, region)):
            parts = [box.shape for box in boxes_of]
            offset = sum(stride * box.first for stride, box in zip(axes, boxes_of))
            groups = [(part[0], stride) for part, stride in zip(parts, axes)]
            tiles = [(part[1], stride * box.step) for part, stride, box in zip(parts, axes, boxes_of)]
            places = [(part[2], stride * box.dilation) for part, stride, box in zip(parts, axes, boxes_of)]
            starts = [box.groups.start for box in boxes_of] + [box.tiles.start for box in boxes_of[1:]]
            index = [0, 0, *(start - begin for start, begin in zip(starts, begins))]
            if queries:
                inner = [*tiles[1:], tiles[0], (lead[2], heads)]
                index += [boxes_of[0].tiles.start, 0]
            else:
                inner = tiles[1:]
            index += [box.places.start for box in boxes_of]
            axes_of = [(lead[0], batch), (lead[1], heads * lead[2]), *groups, *inner, *places]
            kept = [(size, stride, step) for (size, stride), step in zip(axes_of, steps, strict=True) if size > 1]
            at = sum(place * step for place, step in zip(index, steps, strict=True))
            yield Move(
                (*(size for size, _, _ in kept), dim),
                (*(stride for _, stride, _ in kept), last),
                offset,
                (*(step * dim for _, _, step in kept), 1),
                at * dim,
                (*(step for _, _, step in kept), 0),
                at,
            )

    def _boxes(self, what: str, region: Region) -> Iterator[list[Box]]:
        """Per axis the region's boxes."""
        for number, tiles in enumerate(self.axes):
            if what == "queries":
                cut = boxes(tiles.axis, [tiles.tile * at for at in range(tiles.count)], tiles.tile)
            elif number == 0:
                cut = boxes(tiles.axis, [0], self.strip)
            else:
                cut = boxes(tiles.axis, tiles.first, tiles.width)
            wanted = slice(0, tiles.count) if number == 0 else region.tiles[number - 1]
            parts = [box.within(region.groups[number], wanted) for box in cut]
            split = [part for part in parts if part is not None]
            yield split if what != "sums" else [small for part in split for small in part.disjoint()]

    def samples(self, region: Region) -> tuple[list[list[int]], Tensor]:
        """Per axis a tile of each kind in the region; and of every tile of a group which of their products it is like.

        Tiles, and the products, by inner axes and then the loop's.
        """
        name = ("samples", self.kinds(region))
        if name not in self._kept:
            index, found = torch.zeros(1, dtype=torch.long), []
            ranges = [*region.tiles, slice(0, self.loop.count)]
            for tiles, part in zip((*self.inner, self.loop), ranges):
                kinds = tiles.kind[part]
                distinct = list(dict.fromkeys(kinds))
                found.append([part.start + kinds.index(kind) for kind in distinct])
                own = torch.tensor([distinct.index(kind) for kind in kinds])
                index = (index[:, None] * len(distinct) + own).flatten()
            self._kept[name] = [found[-1], *found[:-1]], index
        return self._kept[name]

    def _joined(self, what: str, region: Region, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """The axes' tables `what` of the samples' products as one [groups or 1, products, W, T]."""
        rank, tables = len(self.axes), []
        for number, (tiles, chosen) in enumerate(zip(self.axes, self.samples(region)[0])):
            table = getattr(tiles, what)(chosen)
            if not self.one_group:
                table = table.expand(tiles.axis.groups, *table.shape[1:])[region.groups[number]]
            shape = [1] * 4 * rank
            for part, place in zip(table.shape, (number, rank + (number - 1) % rank, 2 * rank + number)):
                shape[place] = part
            shape[3 * rank + number] = table.shape[3]
            tables.append(table.reshape(shape))
        made = join(tables)
        for part in range(3, -1, -1):
            made = made.flatten(part * rank, part * rank + rank - 1)
        return made

    def spread(self, table: Tensor, region: Region) -> Tensor:
        """A table [..., products of samples, a, b] for every tile of a group, [..., tiles, a, b]."""
        index = self.samples(region)[1]
        return table if table.shape[-3] == len(index) else table.index_select(-3, index)

    def kinds(self, region: Region) -> tuple:
        """What a region's tables depend on."""
        name = ("kinds", region.number)
        if name not in self._kept:
            kinds = tuple(tuple(tiles.kind[part]) for tiles, part in zip(self.inner, region.tiles))
            self._kept[name] = kinds if self.one_group else (kinds, region.groups[0].start, region.number)
        return self._kept[name]

    def allowed(self, region: Region) -> Tensor:
        """[groups or 1, products of samples, keys, queries]: the query sees the key."""
        return self._joined("allowed", region, lambda tables: functools.reduce(torch.logical_and, tables))

    def mask(self, region: Region, repeats: int, added: bool) -> Tensor | None:
        """[groups or 1, tiles, keys, repeats * queries] of a region; None where all is allowed.

        To multiply weights with, 1 where allowed and 0 elsewhere; or, `added`, to add to logits, 0 and -inf.
        """
        if self.closed:
            return None

        def make() -> Tensor:
            allowed = self.allowed(region)
            table = torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf) if added else allowed.float()
            return self.spread(table.repeat(1, 1, 1, repeats), region)

        return self._keep(("mask", self.kinds(region), repeats, added), make)

    def _keep(self, name: tuple, make: Callable[[], Tensor]) -> Tensor:
        """A table, kept from call to call while those of its sort (name[0]) hold at most _KEPT elements."""
        if name in self._kept:
            return self._kept[name]
        made = make()
        if sum(table.numel() for key, table in self._kept.items() if key[0] == name[0]) + made.numel() <= _KEPT:
            self._kept[name] = made
        return made

    def _index(self, what: str, region: Region, radix: Callable[[AxisTiles], int]) -> Tensor:
        """Index tables of all axes as one, row-major in the axes' `radix`."""

        def join(tables: list[Tensor]) -> Tensor:
            joined = tables[0]
            for table, tiles in zip(tables[1:], self.inner):
                joined = joined * radix(tiles) + table
            return joined

        return self._joined(what, region, join)

    def offset(self, region: Region) -> Tensor:
        """[products of samples, keys, queries]: linear index into an offset bias, int32, clamped where not seen."""

        def make() -> Tensor:
            return self._index("offset", region, lambda tiles: 2 * tiles.axis.kernel_size - 1)[0].int()

        return self._keep(("offset", self.kinds(region)), make)

    def seen_offset(self, region: Region) -> Tensor:
        """[groups or 1, products of samples, keys, queries]: `offset`, one past a bias's end where not seen."""

        def make() -> Tensor:
            end = math.prod(2 * tiles.axis.kernel_size - 1 for tiles in self.axes)
            return torch.where(self.allowed(region), self.offset(region), torch.tensor(end, dtype=torch.int32))

        return self._keep(("seen offset", self.kinds(region)), make)

    def slot(self, region: Region) -> Tensor:
        """[groups or 1, tiles, keys, queries]: the window slot."""
        return self.spread(self._index("slot", region, lambda tiles: tiles.axis.kernel_size), region)

    def place(self, region: Region) -> tuple[Tensor, Tensor]:
        """[groups or 1, tiles, slots, queries]: where in the box each slot's key stands, and whether it takes part."""
        present = self._joined("present", region, lambda tables: functools.reduce(torch.logical_and, tables))
        at = self._index("place", region, lambda tiles: tiles.width)
        return self.spread(at, region), self.spread(present, region)


@lru_cache(maxsize=512)
def _tile_shape(axes: tuple[Axis, ...], matrices: int, repeats: int, head_dim: int) -> tuple[float, tuple[int, ...]]:
    """The tile that the cost model likes best, and its cost; the loop axis is the first.

    matrices: batch entries times key heads; repeats: query heads of a key head.
    """
    choices = []
    for number, axis in enumerate(axes):
        longest, found = axis.length(0), []
        for size in sorted({min(size, longest) for size in _SIZES}):
            tiles = axis_tiles(axis, size, number > 0)
            copied = tiles.count * (tiles.width if number else tiles.tile)
            found.append((tiles.tile, tiles.count, tiles.width, copied, axis.groups))
        choices.append(found)
    best, shape = math.inf, (1,) * len(axes)
    for choice in itertools.product(*choices):
        queries, count, keys, copied, groups = (math.prod(part) for part in zip(*choice))
        rows, strips = queries * repeats, matrices * groups
        lanes = -(-rows // _LANES) * _LANES
        cost = keys * head_dim * _PRODUCT_COST * (lanes + rows) + _SOFTMAX_COST * keys * rows + _TILE_COST
        cost = cost * count + 2 * _COPY_COST * head_dim * (copied + rows * count)
        cost = cost * strips + _CHUNK_COST * max(1.0, count * keys * rows * strips / CHUNK)
        if cost < best:
            best, shape = cost, tuple(part[0] for part in choice)
    return best, shape


@lru_cache(maxsize=128)
def _plan(axes: tuple[Axis, ...], own_loop: bool, shape: tuple[int, ...]) -> Plan:
    loop, *inner = (axis_tiles(axis, size, number > 0) for number, (axis, size) in enumerate(zip(axes, shape)))
    once = all(
        sorted(at for box in boxes(t.axis, t.first, t.width) for at in box.coordinates()) == list(range(t.axis.size))
        for t in inner
    )
    return Plan(loop, tuple(inner), own_loop, once)


def plan(problem: Problem, tile: tuple[int, ...] | None = None, separate: bool = False) -> Plan:
    """The cut for `problem`; `tile` (queries per axis) overrides the cost model.

    separate: boxes hold no places of other strips (there is no loop axis but one of its own).
    """
    axes = tuple(
        Axis(size, kernel_size, stride, dilation, is_causal, problem.border)
        for size, kernel_size, stride, dilation, is_causal in zip(
            problem.grid, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal
        )
    )
    alone = (Axis(1, 1), *axes)
    if axes[0].border == "zero" and not axes[0].is_causal and axes[0].kernel_size > 1:
        separate = True  # zero keys would have to stand between the strips
    if tile is not None:
        return _plan(alone, True, (1, *tile)) if separate else _plan(axes, False, tile)
    matrices = 1 << (max(1, problem.batch) * problem.num_heads_kv - 1).bit_length()
    work = matrices, problem.num_heads // problem.num_heads_kv, (problem.head_dim + problem.head_dim_v) // 2
    found = [(*_tile_shape(cut, *work), cut) for cut in ((alone,) if separate else (axes, alone))]
    _, shape, cut = min(found, key=lambda each: each[0])
    return _plan(cut, len(cut) > len(axes), shape)
