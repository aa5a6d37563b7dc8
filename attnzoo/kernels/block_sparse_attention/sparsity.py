"""Which blocks of keys each block of queries attends to: lists, the masks of partly visible blocks, and their algebra.

The list form is what kernels walk. For everything else there is the table [B or 1, H or 1, nq, nk] with one number per
pair of blocks: EMPTY, FULL, or the number of the mask tile that says which of its pairs of tokens are visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_same, check_tensor, per_axis
from attnzoo.kernels.block_sparse_attention.orders import check_order, in_order

FULL, EMPTY = -1, -2

Ranges = Iterable[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Lists:
    """Per row of blocks the other side's active blocks.

    counts int32 [B or 1, H or 1, rows]; indices, tile_ids (None: all visible as a whole) int32 [B or 1, H or 1, rows,
    width]. Entries from counts on mean nothing, and are 0 and -1.
    """

    counts: Tensor
    indices: Tensor
    tile_ids: Tensor | None


def cut(num_tokens: int, block: int) -> int:
    """Blocks of `block` tokens that hold num_tokens, the last one perhaps in part."""
    return -(-num_tokens // block)


def block_sizes(block_size: int | Sequence[int]) -> tuple[int, int]:
    """(queries, keys) of a block; raises TypeError or ValueError."""
    sizes = per_axis("block_size", block_size, 2, low=1)
    return sizes[0], sizes[1]


def lists(table: Tensor, partial: bool, trim: bool = True) -> Lists:
    """The lists of a table, ascending. trim: only as wide as the longest, for which the device is waited for."""
    listed = table != EMPTY
    counts = listed.sum(-1, dtype=torch.int32)
    width = table.shape[-1]
    if trim and not torch.compiler.is_compiling():
        width = max(1, int(counts.max())) if counts.numel() else 1
    indices = (~listed).byte().argsort(dim=-1, stable=True)[..., :width]
    beyond = torch.arange(width, device=table.device) >= counts[..., None]
    tile_ids = table.gather(-1, indices).masked_fill(beyond, FULL).int() if partial else None
    return Lists(counts, indices.masked_fill(beyond, 0).int(), tile_ids)


def unique_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """(the different ones of bool tiles [T, block_q, block_k], number of each tile among them)."""
    if len(tiles) < 2:
        return tiles, torch.zeros(len(tiles), dtype=torch.int64, device=tiles.device)
    flat = tiles.flatten(1)
    bits = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    packed = (bits * (1 << torch.arange(8, device=tiles.device))).sum(-1, dtype=torch.uint8)
    found, number = torch.unique(packed, dim=0, return_inverse=True)
    first = torch.full((len(found),), len(tiles), device=tiles.device)
    first.scatter_reduce_(0, number, torch.arange(len(tiles), device=tiles.device), "amin")
    return tiles[first], number


def _settle(table: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The same with tiles that are used, different from each other, and neither all visible nor all hidden."""
    used = torch.unique(table[table >= 0].long())
    tiles, number = unique_tiles(tiles[used])
    plain = torch.where(tiles.flatten(1).all(1), FULL, torch.where(tiles.flatten(1).any(1), 0, EMPTY))
    kept = plain == 0
    plain[kept] = torch.arange(int(kept.sum()), device=plain.device)
    becomes = torch.full((int(used[-1]) + 1 if len(used) else 1,), EMPTY, device=table.device)
    becomes[used] = plain[number]
    changed = torch.where(table >= 0, becomes[table.clamp(min=0).long()], table.long())
    return changed.int(), tiles[kept]


@dataclass(frozen=True, eq=False)
class BlockSparsity:
    """Active key blocks per query block; made by `from_mask`, `from_indices` and `from_function`.

    Tokens are cut into blocks of block_size = (queries, keys) tokens along their order, the last block of a side
    perhaps in part: nq = ceil(num_queries / queries), nk = ceil(num_keys / keys).

    counts: int32 [B or 1, H or 1, nq], active key blocks of a query block; 0 is allowed (output 0, lse -inf).
    indices: int32 [B or 1, H or 1, nq, width], their numbers in the order in which kernels walk them; entries beyond
        counts are not read. The order matters to `skip_threshold` only.
    tile_ids, tiles: for blocks that are visible in part. tile_ids is like indices, -1 for a block that is visible
        as a whole, else a row of tiles, bool [T, queries, keys]. Both None where there is no such block.
    query_order, key_order: int32 [H or 1, num_queries], [Hkv or 1, num_keys], see `orders`; None: tokens as they stand.

    Immutable; the lists by key block, which the gradient walks, are derived when first needed and kept.
    """

    counts: Tensor
    indices: Tensor
    num_queries: int
    num_keys: int
    block_size: tuple[int, int]
    tile_ids: Tensor | None = None
    tiles: Tensor | None = None
    query_order: Tensor | None = None
    key_order: Tensor | None = None
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------------------------------------ constructors

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        num_queries: int,
        num_keys: int,
        block_size: int | Sequence[int],
        *,
        query_order: Tensor | None = None,
        key_order: Tensor | None = None,
        trim: bool = True,
    ) -> BlockSparsity:
        """From a block mask, bool [B or 1, H or 1, nq, nk] (or [H, nq, nk], or [nq, nk]), True for active blocks.

        block_size: tokens of a block, one number or (queries, keys).
        trim: make the lists only as wide as the longest, which waits for the device once. False keeps the width nk
            (4 nq nk bytes per head): for masks that are made anew at every step. Inside torch.compile always False.
        Raises TypeError, ValueError for arguments that don't fit.
        """
        check_tensor("mask", mask, dtypes=[torch.bool])
        sizes = block_sizes(block_size)
        check_range("num_queries", num_queries, 1)
        check_range("num_keys", num_keys, 1)
        wanted = cut(num_queries, sizes[0]), cut(num_keys, sizes[1])
        if not 2 <= mask.ndim <= 4 or tuple(mask.shape[-2:]) != wanted:
            raise ValueError(
                f"mask must be [B or 1, H or 1, nq={wanted[0]}, nk={wanted[1]}] for {num_queries} queries and "
                f"{num_keys} keys in blocks of {sizes}, got {tuple(mask.shape)}"
            )
        mask = mask.view(*(1,) * (4 - mask.ndim), *mask.shape)
        found = lists(torch.where(mask, FULL, EMPTY), False, trim)
        query_order, key_order = _checked_orders(query_order, key_order, num_queries, num_keys, mask.device)
        return cls(found.counts, found.indices, num_queries, num_keys, sizes, None, None, query_order, key_order)

    @classmethod
    def from_indices(
        cls,
        indices: Tensor,
        counts: Tensor,
        num_queries: int,
        num_keys: int,
        block_size: int | Sequence[int],
        *,
        tile_ids: Tensor | None = None,
        tiles: Tensor | None = None,
        query_order: Tensor | None = None,
        key_order: Tensor | None = None,
    ) -> BlockSparsity:
        """From the lists themselves; fields as the class says, int32 or int64. The order of each list is kept.

        Raises TypeError, ValueError for shapes that don't fit, and for a listed number out of range or listed twice;
        reading the numbers waits for the device (inside torch.compile they are not read).
        """
        sizes = block_sizes(block_size)
        check_range("num_queries", num_queries, 1)
        check_range("num_keys", num_keys, 1)
        rows, columns = cut(num_queries, sizes[0]), cut(num_keys, sizes[1])
        check_tensor("indices", indices, 4, [torch.int32, torch.int64])
        check_tensor("counts", counts, 3, [torch.int32, torch.int64])
        if indices.shape[2] != rows or indices.shape[3] == 0:
            raise ValueError(
                f"indices must be [B or 1, H or 1, nq={rows}, at least 1] for {num_queries} queries in blocks of "
                f"{sizes[0]}, got {tuple(indices.shape)}"
            )
        if counts.shape != indices.shape[:3]:
            raise ValueError(f"counts must be {tuple(indices.shape[:3])} like indices, got {tuple(counts.shape)}")
        if (tile_ids is None) != (tiles is None):
            raise ValueError(f"tile_ids and tiles go together, got {type(tile_ids).__name__}, {type(tiles).__name__}")
        if tile_ids is not None and tiles is not None:
            check_tensor("tile_ids", tile_ids, 4, [torch.int32, torch.int64])
            check_tensor("tiles", tiles, 3, [torch.bool])
            if tile_ids.shape != indices.shape:
                raise ValueError(f"tile_ids must be {tuple(indices.shape)} like indices, got {tuple(tile_ids.shape)}")
            if tuple(tiles.shape[1:]) != sizes or len(tiles) == 0:
                raise ValueError(f"tiles must be [at least 1, {sizes[0]}, {sizes[1]}], got {tuple(tiles.shape)}")
        check_same("device", indices=indices, counts=counts, tile_ids=tile_ids, tiles=tiles)
        width = indices.shape[3]
        beyond = torch.arange(width, device=indices.device) >= counts[..., None]
        if not torch.compiler.is_compiling():
            _check_numbers("counts", counts, 0, width)
            _check_numbers("indices", indices.masked_fill(beyond, 0), 0, columns - 1)
            places = torch.where(beyond, columns + torch.arange(width, device=indices.device), indices).sort(-1).values
            if bool((places[..., 1:] == places[..., :-1]).any()):
                raise ValueError("indices must list a key block at most once per query block")
            if tile_ids is not None and tiles is not None:
                _check_numbers("tile_ids", tile_ids.masked_fill(beyond, FULL), FULL, len(tiles) - 1)
        query_order, key_order = _checked_orders(query_order, key_order, num_queries, num_keys, indices.device)
        return cls(
            counts.int().contiguous(),
            indices.masked_fill(beyond, 0).int().contiguous(),
            num_queries,
            num_keys,
            sizes,
            None if tile_ids is None else tile_ids.masked_fill(beyond, FULL).int().contiguous(),
            None if tiles is None else tiles.contiguous(),
            query_order,
            key_order,
        )

    @classmethod
    def from_table(
        cls,
        table: Tensor,
        tiles: Tensor | None,
        num_queries: int,
        num_keys: int,
        block_size: tuple[int, int],
        query_order: Tensor | None = None,
        key_order: Tensor | None = None,
    ) -> BlockSparsity:
        """From a table (see the module's text) and its tiles, taken as correct; equal tiles are made one."""
        if tiles is not None:
            table, tiles = _settle(table, tiles)
        partial = tiles is not None and len(tiles) > 0
        found = lists(table, partial)
        kept = tiles if partial else None
        order = query_order, key_order
        return cls(found.counts, found.indices, num_queries, num_keys, block_size, found.tile_ids, kept, *order)

    @classmethod
    def from_function(cls, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> BlockSparsity:
        """From a mask function over grid coordinates; see `patterns.from_function`, which has the same arguments."""
        from attnzoo.kernels.block_sparse_attention import patterns  # it builds on this module

        return patterns.from_function(function, *args, **kwargs)

    # -------------------------------------------------------------------------------------------------- other forms

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.indices.device

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(nq, nk)."""
        return cut(self.num_queries, self.block_size[0]), cut(self.num_keys, self.block_size[1])

    @property
    def density(self) -> float:
        """Active pairs of blocks / all pairs of blocks: the share of dense attention's work. Waits for the device."""
        return float(self.counts.double().mean()) / self.num_blocks[1]

    def table(self) -> Tensor:
        """int32 [B or 1, H or 1, nq, nk]: EMPTY (-2), FULL (-1) or a number of `tiles`."""
        rows, columns = self.num_blocks
        beyond = torch.arange(self.indices.shape[-1], device=self.device) >= self.counts[..., None]
        state = torch.full_like(self.indices, FULL) if self.tile_ids is None else self.tile_ids
        spare = self.indices.masked_fill(beyond, columns).long()  # what lies beyond counts goes to a spare column
        made = torch.full((*self.indices.shape[:2], rows, columns + 1), EMPTY, dtype=torch.int32, device=self.device)
        return made.scatter_(-1, spare, state)[..., :columns]

    def block_mask(self) -> Tensor:
        """bool [B or 1, H or 1, nq, nk]: True for active blocks, those visible in part included."""
        return self.table() != EMPTY

    def element_mask(self) -> Tensor:
        """bool [B or 1, H or 1, num_queries, num_keys] along the orders: every pair, for small problems and tests."""
        (rows, columns), (block_q, block_k), table = self.num_blocks, self.block_size, self.table()
        ends = torch.tensor([[[True]], [[False]]], device=self.device).expand(2, block_q, block_k)  # FULL, EMPTY
        pool = ends if self.tiles is None else torch.cat([ends, self.tiles])
        number = torch.where(table >= 0, table + 2, -1 - table).long()
        made = pool[number].transpose(3, 4).reshape(*table.shape[:2], rows * block_q, columns * block_k)
        return made[..., : self.num_queries, : self.num_keys]

    def by_key(self) -> Lists:
        """The same pairs listed per key block; kept after the first call (not inside torch.compile)."""
        if "by_key" in self._kept:
            return self._kept["by_key"]
        found = lists(self.table().transpose(2, 3), self.tiles is not None)
        if not torch.compiler.is_compiling():
            self._kept["by_key"] = found
        return found

    def to(self, device: torch.device | str) -> BlockSparsity:
        """The same on a device."""
        names = ("counts", "indices", "tile_ids", "tiles", "query_order", "key_order")
        moved: dict[str, Any] = {n: None if t is None else t.to(device) for n in names for t in (getattr(self, n),)}
        return replace(self, **moved, _kept={})

    def with_orders(self, query_order: Tensor | None, key_order: Tensor | None) -> BlockSparsity:
        """The same blocks cut along other orders (None: tokens as they stand); raises as `check_order`."""
        order = _checked_orders(query_order, key_order, self.num_queries, self.num_keys, self.device)
        return replace(self, query_order=order[0], key_order=order[1])

    # ------------------------------------------------------------------------------------------------------- algebra

    def __and__(self, other: BlockSparsity) -> BlockSparsity:
        """Pairs that both make visible. Same tokens, blocks and orders, else ValueError; lists ascend afterwards."""
        return self._joined(other, torch.logical_and)

    def __or__(self, other: BlockSparsity) -> BlockSparsity:
        """Pairs that either makes visible; as `&` otherwise."""
        return self._joined(other, torch.logical_or)

    def _joined(self, other: BlockSparsity, operation: Callable[[Tensor, Tensor], Tensor]) -> BlockSparsity:
        if not isinstance(other, BlockSparsity):
            return NotImplemented
        check_same("device", self=self.indices, other=other.indices)
        for name in ("num_queries", "num_keys", "block_size"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"both must have one {name}, got {getattr(self, name)} and {getattr(other, name)}")
        for name in ("query_order", "key_order"):
            mine, its = getattr(self, name), getattr(other, name)
            if (mine is None) != (its is None) or (mine is not None and not torch.equal(mine, its)):
                raise ValueError(f"both must have one {name}")
        for axis, what in enumerate(("batch", "heads")):
            sizes = self.indices.shape[axis], other.indices.shape[axis]
            if sizes[0] != sizes[1] and 1 not in sizes:
                raise ValueError(f"both must have one {what} or 1, got {sizes[0]} and {sizes[1]}")
        mine, its = torch.broadcast_tensors(self.table(), other.table())
        base = 2 + (0 if other.tiles is None else len(other.tiles))
        codes, number = torch.unique((mine.long() + 2) * base + its + 2, return_inverse=True)
        made = operation(self._content(codes // base - 2), other._content(codes % base - 2))
        order = self.query_order, self.key_order
        return self.from_table(number.int(), made, self.num_queries, self.num_keys, self.block_size, *order)

    def _content(self, states: Tensor) -> Tensor:
        """bool [len(states), queries, keys]: what a state of the table makes visible."""
        made = (states == FULL)[:, None, None].expand(-1, *self.block_size)
        if self.tiles is None:
            return made
        return torch.where((states >= 0)[:, None, None], self.tiles[states.clamp(min=0)], made)

    def with_dense(self, queries: Ranges = (), keys: Ranges = ()) -> BlockSparsity:
        """The same with global tokens: ranges (start, stop) of queries that see every key, of keys that all see.

        Ranges count tokens as they stand (not along the orders) and need not fall on the borders of blocks. For text
        tokens that all see and that see all, name them in both. Lists ascend afterwards.
        Raises TypeError, ValueError for ranges that don't fit.
        """
        rows = _patterns(flags("queries", queries, self.num_queries), self.query_order, self.block_size[0], self.device)
        columns = _patterns(flags("keys", keys, self.num_keys), self.key_order, self.block_size[1], self.device)
        heads = max(len(rows[1]), len(columns[1]))
        row_of, column_of = (of.repeat_interleave(heads // len(of), 0) for _, of in (rows, columns))
        table = self.table().long() + 2
        code = (table * len(rows[0]) + row_of[None, :, :, None]) * len(columns[0]) + column_of[None, :, None, :]
        codes, number = torch.unique(code, return_inverse=True)
        made = self._content(codes // (len(rows[0]) * len(columns[0])) - 2)
        made = made | rows[0][codes // len(columns[0]) % len(rows[0])][:, :, None]
        made = made | columns[0][codes % len(columns[0])][:, None, :]
        order = self.query_order, self.key_order
        return self.from_table(number.int(), made, self.num_queries, self.num_keys, self.block_size, *order)


def flags(name: str, ranges: Ranges, num_tokens: int) -> Tensor:
    """bool [num_tokens], True within the ranges; raises TypeError or ValueError."""
    made = torch.zeros(num_tokens, dtype=torch.bool)
    for entry in ranges:
        if not (isinstance(entry, Sequence) and len(entry) == 2 and all(type(end) is int for end in entry)):
            raise TypeError(f"{name} must hold pairs (start, stop) of integers, got {entry!r}")
        start, stop = entry
        if not 0 <= start <= stop <= num_tokens:
            raise ValueError(f"{name} must lie within 0 to {num_tokens} with start <= stop, got {entry!r}")
        made[start:stop] = True
    return made


def _patterns(flag: Tensor, order: Tensor | None, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(different patterns of flags in a block, bool [P, block]; which one each block has, [heads or 1, blocks])."""
    heads, (tokens,) = 1 if order is None else len(order), flag.shape
    along = in_order(flag.to(device).expand(1, heads, -1), order)[0]
    along = torch.nn.functional.pad(along, (0, -tokens % block)).unflatten(1, (-1, block))
    rest = -tokens % block
    if rest:  # what is beyond the end does not count: a last block of only global tokens is visible as a whole
        along[:, -1, block - rest :] = along[:, -1, : block - rest].all(-1, keepdim=True)
    found, number = torch.unique(along.flatten(0, 1), dim=0, return_inverse=True)
    return found, number.view(heads, -1)


def _checked_orders(
    query_order: Tensor | None, key_order: Tensor | None, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Both orders as `check_order` returns them, on `device`."""
    found = check_order("query_order", query_order, num_queries), check_order("key_order", key_order, num_keys)
    moved = [order if order is None else order.to(device) for order in found]
    return moved[0], moved[1]


def _check_numbers(name: str, numbers: Tensor, low: int, high: int) -> None:
    if numbers.numel() and not (low <= int(numbers.min()) and int(numbers.max()) <= high):
        raise ValueError(
            f"{name} must hold numbers from {low} to {high}, got {int(numbers.min())} to {int(numbers.max())}"
        )
