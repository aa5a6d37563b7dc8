"""How the CPU path cuts a grid: tiles of queries, each with the smallest box of keys that holds all its windows.

Every axis is cut into dilation groups and a group into tiles of one length, so that a box has no holes. One axis, the
loop axis, is worked through tile by tile: its keys are copied once, and the tile at hand reads a range of them. Along
the other axes, the inner ones, the boxes overlap and are copied with the overlap. What is copied has the layout

    queries  [loop tiles, B, heads_kv, *groups, *inner tiles, heads per key head, *queries of a tile per axis, dim]
    keys     [B, heads_kv, *groups, *inner tiles, keys of the loop axis, *keys of a box per inner axis, dim]

so that all boxes of one loop tile are one batch of matrices with rows in a row: [B * heads_kv * groups * inner tiles,
keys, dim]. Copies go piece by piece (`Piece`): rectangles whose coordinates advance evenly, which a strided view reads
or writes. Places without a token (keys outside the grid, queries beyond a group's end) hold zeros; for border "zero"
these are the zero keys that take softmax mass.

Tiles whose queries see the same places of their box are of one kind (`AxisTiles.kind`), and share tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

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
CHUNK = 1 << 16  # query-key pairs that are worked on at a time
_KEPT = 1 << 21  # elements of tables that a plan may keep


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

    def coordinates(self) -> Iterator[int]:
        """The coordinates of all its tokens."""
        for group, tile, place in itertools.product(*map(range, self.shape)):
            yield self.first + group + self.step * tile + self.dilation * place


def boxes(axis: Axis, first: list[int], width: int, disjoint: bool = False) -> tuple[Box, ...]:
    """The tokens of an axis cut into `width` places from position first[tile] on, of every dilation group.

    Without the places that lie outside the grid. disjoint: no coordinate stands twice in one box.
    """
    found = []
    shorter = axis.size % axis.dilation if axis.size > axis.dilation else 0  # from this group on, a member fewer
    for begin, end in ((0, shorter), (shorter, axis.groups)):
        length, tile = axis.length(begin), 0
        inside = [(max(0, -at), min(width, length - at)) for at in first]
        while tile < len(first) and begin < end:
            last = tile + 1
            step = first[last] - first[tile] if last < len(first) else width
            while last < len(first) and inside[last] == inside[tile] and first[last] - first[last - 1] == step:
                last += 1
            if disjoint and step == 0:
                last = tile + 1
            low, high = inside[tile]
            length_of_piece = step if disjoint and last - tile > 1 else max(1, width)
            for place in range(low, high, length_of_piece):
                found.append(
                    Box(
                        slice(begin, end),
                        slice(tile, last),
                        slice(place, min(place + length_of_piece, high)),
                        begin + axis.dilation * (first[tile] + place),
                        axis.dilation * step,
                        axis.dilation,
                    )
                )
            tile = last
    return tuple(found)


@dataclass(frozen=True)
class AxisTiles:
    """Tiles of one axis: T queries and a box of keys each. Positions count within a dilation group.

    Tables hold one group where all groups have the same.
    """

    axis: Axis
    first: list[int]  # position of each box's first key
    widths: list[int]  # keys of each box; on an inner axis all have as many as the widest
    position: Tensor  # [tiles, T] of the queries
    start: Tensor  # [groups, tiles, T] position of the window's slot 0; beyond a group's end its last query stands again
    low: Tensor  # [groups, tiles, T] first and
    high: Tensor  # [groups, tiles, T] last position that takes part
    kind: list[int]  # tiles of one kind have equal tables
    sample: list[int]  # a tile of each kind

    @property
    def tile(self) -> int:
        """T, the queries of a tile."""
        return self.position.shape[1]

    def _keys(self, tiles: list[int]) -> Tensor:
        """[tiles, W, 1] key positions of the given tiles' boxes."""
        begin = torch.tensor([self.first[tile] for tile in tiles])
        return begin[:, None, None] + torch.arange(self.widths[tiles[0]])[:, None]

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

    def place(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, K, T]: where in the box each slot's key stands, clamped where the slot takes no part."""
        slots = self.start[:, tiles, None] + torch.arange(self.axis.kernel_size)[:, None]
        begin = torch.tensor([self.first[tile] for tile in tiles])[:, None, None]
        return (slots - begin).clamp_(0, self.widths[tiles[0]] - 1)

    def present(self, tiles: list[int]) -> Tensor:
        """[groups, tiles, K, T]: the slot takes part."""
        slots = self.start[:, tiles, None] + torch.arange(self.axis.kernel_size)[:, None]
        return (slots >= self.low[:, tiles, None]) & (slots <= self.high[:, tiles, None])


@lru_cache(maxsize=512)
def axis_tiles(axis: Axis, tile: int, inner: bool) -> AxisTiles:
    """The axis in tiles of `tile` queries (fewer where no dilation group has as many), as an inner axis or the loop's."""
    windows = axis_windows(axis.size, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal, axis.border)
    longest = axis.length(0)
    tile = min(tile, longest)
    count = -(-longest // tile)
    lengths = torch.tensor([axis.length(group) for group in range(axis.groups)])[:, None]
    position = torch.arange(count * tile)
    coordinate = torch.arange(axis.groups)[:, None] + axis.dilation * torch.minimum(position, lengths - 1)
    tables = [table[coordinate].view(-1, count, tile) for table in (windows.start, windows.low, windows.high)]
    lowest, highest = tables[1].amin((0, 2)), tables[2].amax((0, 2))
    widths, first = highest - lowest + 1, lowest
    if inner:  # at the end a box of full width moves inward, so that fewer of its places lie outside the grid
        widest = widths.amax()
        first = torch.minimum(lowest, torch.maximum(highest.amax() + 1 - widest, lowest.amin()))
        widths = widest.expand(count)
    if all(bool((table == table[:1]).all()) for table in tables):
        tables = [table[:1] for table in tables]
    position = position.view(count, tile)
    relative = [(table - first[:, None]).transpose(0, 1).flatten(1) for table in (*tables, position[None])]
    names: dict[tuple[int, ...], int] = {}
    kind = []
    for row in torch.cat([*relative, widths[:, None]], 1).tolist():
        kind.append(names.setdefault(tuple(row), len(names)))
    sample = [kind.index(number) for number in range(len(names))]
    return AxisTiles(axis, first.tolist(), widths.tolist(), position, *tables, kind, sample)


def _cross(tables: list[Tensor], join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """One table per axis, [groups, tiles, W, T] each, as one of the same four axes, every one the product of theirs.

    An axis whose table holds one group is joined with every group of the others.
    """
    joined = tables[0]
    for table in tables[1:]:
        left = joined[:, None, :, None, :, None, :, None]
        made = join(left, table[None, :, None, :, None, :, None, :])
        joined = made.flatten(6, 7).flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return joined


@dataclass(frozen=True)
class Chunk:
    """What is worked on at a time: of one loop tile, the inner tiles `tiles` of the groups `groups`.

    It is all of them, or the boxes are of one batch entry and head. rows: the same as a slice of the boxes, None for
    all; first, count: which of a box's keys.
    """

    number: int
    groups: slice
    tiles: slice
    rows: slice | None
    first: int
    count: int

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Groups and tiles."""
        return self.groups.stop - self.groups.start, self.tiles.stop - self.tiles.start

    def queries(self, tiles: Sequence[Tensor]) -> Tensor:
        """The chunk's part of query tiles [boxes, ...], given per loop tile."""
        part = tiles[self.number]
        return part if self.rows is None else part[self.rows]

    def boxes(self, boxes: Tensor) -> Tensor:
        """The chunk's part of key boxes [boxes, keys, dim]."""
        part = boxes.narrow(1, self.first, self.count)
        return part if self.rows is None else part[self.rows]


@dataclass(frozen=True)
class Plan:
    """A grid cut into tiles; see the module's text. The loop axis comes first; it may be one of size 1 of its own."""

    loop: AxisTiles
    inner: tuple[AxisTiles, ...]
    own_loop: bool  # the grid has no axis for the loop
    span: tuple[int, int]  # first position of the loop axis's keys, and how many are copied
    query_pieces: tuple[tuple[Box, ...], ...]
    key_pieces: tuple[tuple[Box, ...], ...]
    key_sums: tuple[tuple[Box, ...], ...]  # the same places, in pieces that hold no key twice
    key_once: bool  # every key is copied to exactly one place
    _masks: dict[tuple[int, int, bool], Tensor | None] = field(default_factory=dict)
    _chunks: dict[tuple[bool, int, int], tuple[Chunk, ...]] = field(default_factory=dict)

    @cached_property
    def tiles(self) -> tuple[AxisTiles, ...]:
        """All axes, the loop first."""
        return (self.loop, *self.inner)

    @cached_property
    def groups(self) -> int:
        """Dilation groups of all axes."""
        return math.prod(tiles.axis.groups for tiles in self.tiles)

    @cached_property
    def inner_tiles(self) -> int:
        """Inner tiles of one group."""
        return math.prod(len(tiles.first) for tiles in self.inner)

    @cached_property
    def inner_width(self) -> int:
        """Keys of a box per key of the loop axis."""
        return math.prod(tiles.widths[0] for tiles in self.inner)

    @cached_property
    def queries(self) -> int:
        """Queries of a tile."""
        return math.prod(tiles.tile for tiles in self.tiles)

    def keys(self, number: int) -> tuple[int, int]:
        """Of a loop tile: the first of its keys among those that are copied, and their number."""
        width = self.inner_width
        return (self.loop.first[number] - self.span[0]) * width, self.loop.widths[number] * width

    @cached_property
    def most_keys(self) -> int:
        """Keys of the widest loop tile's boxes."""
        return max(self.loop.widths) * self.inner_width

    @cached_property
    def joined_kinds(self) -> tuple[list[tuple[int, ...]], Tensor]:
        """A sample of each kind of inner tile (a tile number per inner axis), and the kind of every inner tile."""
        samples = list(itertools.product(*(tiles.sample for tiles in self.inner)))
        kinds = torch.zeros(1, dtype=torch.long)
        for tiles in self.inner:
            kinds = (kinds[:, None] * len(tiles.sample) + torch.tensor(tiles.kind)).flatten()
        return samples, kinds

    def chunks(self, single: bool, rows: int, limit: int) -> tuple[Chunk, ...]:
        """All loop tiles in chunks: of `limit` query-key pairs for a single batch entry and head, else one each.

        rows: queries of a tile, once per query head.
        """
        name = (single, rows, limit)
        if name not in self._chunks:
            self._chunks[name] = tuple(self._cut(*name))
        return self._chunks[name]

    def _cut(self, single: bool, rows: int, limit: int) -> Iterator[Chunk]:
        groups, tiles = self.groups, self.inner_tiles
        for number in range(len(self.loop.first)):
            keys = self.keys(number)
            held = max(1, limit // (keys[1] * rows))
            if not single or held >= groups * tiles:
                yield Chunk(number, slice(0, groups), slice(0, tiles), None, *keys)
                continue
            at_once, part = max(1, held // tiles), min(held, tiles)
            part = -(-tiles // -(-tiles // part))
            for group in range(0, groups, at_once):
                end = min(group + at_once, groups)
                for tile in range(0, tiles, part):
                    stop = min(tile + part, tiles)
                    these = slice(group * tiles + tile, (end - 1) * tiles + stop)
                    yield Chunk(number, slice(group, end), slice(tile, stop), these, *keys)

    def _tables(self, what: str, number: int) -> list[Tensor]:
        """Of one loop tile and every kind of inner tile, the table `what` of each axis."""
        tables = [getattr(self.loop, what)([number])]
        return [*tables, *(getattr(tiles, what)(tiles.sample) for tiles in self.inner)]

    def _index(self, what: str, number: int, radix: Callable[[AxisTiles], int]) -> Tensor:
        """Index tables of all axes as one, row-major in the axes' `radix`."""
        joined, *others = self._tables(what, number)
        for table, tiles in zip(others, self.inner):
            base = radix(tiles)
            joined = _cross([joined, table], lambda a, b, base=base: a * base + b)  # type: ignore[misc]
        return joined

    def spread(self, table: Tensor) -> Tensor:
        """A table [groups, kinds, ...] for every inner tile."""
        return table.index_select(1, self.joined_kinds[1])

    def allowed(self, number: int) -> Tensor:
        """[groups or 1, kinds, keys, queries] of a loop tile: the query sees the key."""
        return _cross(self._tables("allowed", number), torch.logical_and)

    def mask(self, number: int, repeats: int, added: bool) -> Tensor | None:
        """[groups or 1, inner tiles, keys, repeats * queries] of a loop tile; None where all is allowed.

        To multiply weights with, 1 where allowed and 0 elsewhere; or, `added`, to add to logits, 0 and -inf.
        """
        name = (self.loop.kind[number], repeats, added)
        if name in self._masks:
            return self._masks[name]
        allowed, made = self.allowed(number), None
        if not bool(allowed.all()):
            table = torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf) if added else allowed.float()
            made = self.spread(table.repeat(1, 1, 1, repeats))
        held = sum(mask.numel() for mask in self._masks.values() if mask is not None)
        if made is None or held + made.numel() <= _KEPT:
            self._masks[name] = made
        return made

    def offset(self, number: int) -> Tensor:
        """[kinds, keys, queries]: linear index into an offset bias."""
        return self._index("offset", number, lambda tiles: 2 * tiles.axis.kernel_size - 1)[0]

    def slot(self, number: int) -> Tensor:
        """[groups or 1, inner tiles, keys, queries]: the window slot."""
        return self.spread(self._index("slot", number, lambda tiles: tiles.axis.kernel_size))

    def place(self, number: int) -> tuple[Tensor, Tensor]:
        """[groups or 1, inner tiles, slots, queries]: where in the box each slot's key stands, and if it takes part."""
        at = self._index("place", number, lambda tiles: tiles.widths[0])
        present = _cross(self._tables("present", number), torch.logical_and)
        return self.spread(at), self.spread(present)


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
            keys = sum(tiles.widths)
            found.append((tiles.tile, len(tiles.first), keys, keys if number else longest, axis.groups))
        choices.append(found)
    best, shape = math.inf, (1,) * len(axes)
    for choice in itertools.product(*choices):
        queries, tiles, keys, copied, groups = (math.prod(part) for part in zip(*choice))if False else (
            math.prod(part) for part in zip(*choice)
        )
        rows, boxes_at_once = queries * repeats, matrices * groups
        lanes = -(-rows // _LANES) * _LANES
        pairs = keys * rows
        cost = keys * head_dim * _PRODUCT_COST * (lanes + rows) + _SOFTMAX_COST * pairs + _TILE_COST * tiles
        cost += 2 * _COPY_COST * head_dim * (copied + rows * tiles)
        calls = max(choice[0][1], pairs * boxes_at_once / CHUNK)
        cost = cost * boxes_at_once + _CHUNK_COST * calls
        if cost < best:
            best, shape = cost, tuple(part[0] for part in choice)
    return best, shape


@lru_cache(maxsize=128)
def _plan(axes: tuple[Axis, ...], own_loop: bool, shape: tuple[int, ...]) -> Plan:
    loop, *inner = (axis_tiles(axis, size, number > 0) for number, (axis, size) in enumerate(zip(axes, shape)))
    begin = min(loop.first)
    span = (begin, max(first + width for first, width in zip(loop.first, loop.widths)) - begin)
    key_cuts = [(loop.axis, [begin], span[1]), *((tiles.axis, tiles.first, tiles.widths[0]) for tiles in inner)]
    query_cuts = [(t.axis, list(range(0, t.position.numel(), t.tile)), t.tile) for t in (loop, *inner)]
    key_sums = [boxes(*cut, disjoint=True) for cut in key_cuts]
    once = all(
        sorted(at for box in found for at in box.coordinates()) == list(range(cut[0].size))
        for found, cut in zip(key_sums, key_cuts)
    )
    return Plan(
        loop,
        tuple(inner),
        own_loop,
        span,
        tuple(itertools.product(*(boxes(*cut) for cut in query_cuts))),
        tuple(itertools.product(*(boxes(*cut) for cut in key_cuts))),
        tuple(itertools.product(*key_sums)),
        once,
    )


def plan(problem: Problem, tile: tuple[int, ...] | None = None) -> Plan:
    """The cut for `problem`; `tile` (queries per axis) overrides the cost model, the loop is then the first axis."""
    axes = tuple(
        Axis(size, kernel_size, stride, dilation, is_causal, problem.border)
        for size, kernel_size, stride, dilation, is_causal in zip(
            problem.grid, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal
        )
    )
    if tile is not None:
        return _plan(axes, False, tile)
    matrices = 1 << (max(1, problem.batch) * problem.num_heads_kv - 1).bit_length()
    work = matrices, problem.num_heads // problem.num_heads_kv, (problem.head_dim + problem.head_dim_v) // 2
    alone = (Axis(1, 1), *axes)
    found = [(*_tile_shape(cut, *work), cut) for cut in (axes, alone)]
    _, shape, cut = min(found, key=lambda each: each[0])
    return _plan(cut, cut is alone, shape)
