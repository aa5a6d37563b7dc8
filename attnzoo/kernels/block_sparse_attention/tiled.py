"""The CPU path: batched matrix products over the gathered blocks of keys, a few query blocks at a time.

Per head keys and values are laid out once, block by block along the order. Query blocks with lists of one length go
together; their key blocks are copied side by side into a buffer that stays in the processor's cache, and one product
gives all their logits. Held at a time: SCORE_ELEMENTS logits, or those of one query block where that is more, the
gathered rows beside them, and one head's keys, values and outputs. The gradient recomputes the logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.kernels.block_sparse_attention.problem import Call
from attnzoo.kernels.block_sparse_attention.sparsity import cut

INF = float("inf")
FLOOR, TINY = -80.0, 1e-34  # of float32: exp(FLOOR) < TINY, and weights below TINY are 0
SCORE_ELEMENTS = 1 << 17
BOUND = 32.0  # logits that can't pass it need no maximum taken off: exp(BOUND) is 8e13, and every sum fits
POOL_ELEMENTS = 1 << 24  # of mask tiles that are kept as numbers to add


class _Buffers:
    """Memory that is used again and again, by name."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of `shape`; the last one of that name is overwritten."""
        count = 1
        for size in shape:
            count *= size
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = torch.empty(count, dtype=self.dtype)
        return self.kept[name][:count].view(shape)


@dataclass(frozen=True)
class _Side:
    """One side of one head of one batch entry: where its tokens stand, and how they are cut."""

    order: Tensor | None  # int64 [N]
    num_tokens: int
    block: int

    @property
    def even(self) -> bool:
        """Blocks are the rows as they stand, all of one length."""
        return self.order is None and self.num_tokens % self.block == 0

    def cut(self, rows: Tensor, dtype: torch.dtype, buffers: _Buffers | None = None, name: str = "") -> Tensor:
        """Rows [N, ...] as blocks [n, block, ...] along the order, zeros beyond the end; a copy.

        Gathering from contiguous blocks is three times as fast as from the rows of one head among others.
        """
        blocks = cut(self.num_tokens, self.block)
        shape = (blocks * self.block, *rows.shape[1:])
        made = torch.empty(shape, dtype=dtype) if buffers is None else buffers.get(name, *shape)
        made[: self.num_tokens] = rows if self.order is None else rows.index_select(0, self.order)
        made[self.num_tokens :] = 0
        return made.unflatten(0, (blocks, self.block))

    def room(self, into: Tensor, dtype: torch.dtype, empty: float | None) -> Tensor:
        """Blocks to be filled and then given to `put`, filled with `empty` where it is not None."""
        if self.even and into.dtype == dtype:
            made = into.unflatten(0, (-1, self.block))
        else:
            blocks = cut(self.num_tokens, self.block)
            made = torch.empty((blocks, self.block, *into.shape[1:]), dtype=dtype)
        return made if empty is None else made.fill_(empty)

    def put(self, into: Tensor, blocks: Tensor) -> None:
        """The inverse of `cut`, into rows [N, ...]; `blocks` that `room` cut from them are there already."""
        if self.even and into.dtype == blocks.dtype and into.data_ptr() == blocks.data_ptr():
            return
        rows = blocks.flatten(0, 1)[: self.num_tokens].to(into.dtype)
        if self.order is None:
            into.copy_(rows)
        else:
            into[self.order] = rows

    def tokens(self) -> Tensor:
        """int64 [n, block]: which token stands where; num_tokens beyond the end."""
        blocks = cut(self.num_tokens, self.block)
        made = torch.full((blocks * self.block,), self.num_tokens)
        made[: self.num_tokens] = torch.arange(self.num_tokens) if self.order is None else self.order
        return made.view(blocks, self.block)


def _sides(call: Call, head: int) -> tuple[_Side, _Side]:
    """The query and the key side of a query head."""
    heads, heads_kv = call.query.shape[2], call.key.shape[2]
    found = []
    for order, own, size, block in (
        (call.query_order, head, call.query.shape[1], call.block_q),
        (call.key_order, head // (heads // heads_kv), call.key.shape[1], call.block_k),
    ):
        found.append(_Side(None if order is None else order[own if len(order) > 1 else 0].long(), size, block))
    return found[0], found[1]


@dataclass(frozen=True)
class _Group:
    """Query blocks `rows` whose lists are all `length` long, and what their blocks [G, length] do not show."""

    rows: Tensor | slice  # a slice where they are neighbours: then nothing is copied
    blocks: Tensor
    length: int
    keys: Tensor | None  # 0 or -inf, [G, 1, length * block_k]
    tiles: Tensor | None  # numbers in the pool [G, length]
    late: Tensor | None  # bool [G, block_q, length * block_k], True for keys after the query

    @property
    def masked(self) -> bool:
        """Whether a query may see no key at all."""
        return self.keys is not None or self.tiles is not None or self.late is not None


@dataclass(frozen=True)
class _Head:
    """The lists of one query head of one batch entry, and which keys and pairs a listed block does not show."""

    call: Call
    counts: Tensor  # [nq]
    indices: Tensor  # [nq, width]
    tile_ids: Tensor | None
    whole: int  # the pool's all-visible tile
    real: Tensor | None  # 0 or -inf, [nk, block_k]; None: all keys are there
    query_tokens: Tensor | None  # [nq, block_q], where is_causal
    key_tokens: Tensor | None

    def groups(self) -> Iterator[_Group]:
        """Query blocks with at least one key block."""
        area = self.call.block_q * self.call.block_k
        by_length: dict[int, list[int]] = {}
        for row, length in enumerate(self.counts.tolist()):
            by_length.setdefault(length, []).append(row)
        by_length.pop(0, None)
        for length, rows in by_length.items():
            step = max(1, SCORE_ELEMENTS // (area * length))
            for first in range(0, len(rows), step):
                some = rows[first : first + step]
                if some[-1] - some[0] == len(some) - 1:
                    yield self._group(slice(some[0], some[-1] + 1), length)
                else:
                    yield self._group(torch.tensor(some), length)

    def _group(self, rows: Tensor | slice, length: int) -> _Group:
        blocks = self.indices[rows, :length]
        keys = tiles = late = None
        if self.real is not None:
            keys = self.real[blocks].flatten(1)[:, None, :]
            keys = keys if bool((keys != 0).any()) else None
        if self.tile_ids is not None:
            number = self.tile_ids[rows, :length]
            tiles = number.where(number >= 0, self.whole) if bool((number >= 0).any()) else None
        if self.query_tokens is not None and self.key_tokens is not None:
            last = self.query_tokens[rows] + self.call.key.shape[1] - self.call.query.shape[1]
            late = self.key_tokens[blocks].flatten(1)[:, None, :] > last[:, :, None]
            late = late if bool(late.any()) else None
        return _Group(rows, blocks, length, keys, tiles, late)


def _head(call: Call, b: int, head: int, sides: tuple[_Side, _Side]) -> _Head:
    def own(tensor: Tensor) -> Tensor:
        return tensor[b if tensor.shape[0] > 1 else 0, head if tensor.shape[1] > 1 else 0].long()

    queries, keys = sides
    real: Tensor | None = None
    if call.key_mask is not None:
        real = keys.cut(call.key_mask[b if len(call.key_mask) > 1 else 0], torch.bool)
    elif keys.num_tokens % keys.block:
        real = keys.tokens() < keys.num_tokens
    return _Head(
        call,
        own(call.counts),
        own(call.indices),
        None if call.tile_ids is None else own(call.tile_ids),
        0 if call.tiles is None else len(call.tiles),
        None if real is None else _hides(real, call.dtype),
        queries.tokens() if call.is_causal else None,
        keys.tokens() if call.is_causal else None,
    )


class _Lists:
    """The groups of every head; those of heads with the same lists are made once (not with is_causal: too large)."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.kept: dict[tuple[int, int], list[_Group]] = {}

    def groups(self, b: int, head: int, sides: tuple[_Side, _Side]) -> Iterable[_Group]:
        """The groups of one query head of one batch entry."""
        call = self.call
        if call.is_causal:
            return _head(call, b, head, sides).groups()
        by_batch = call.counts.shape[0] > 1 or (call.key_mask is not None and len(call.key_mask) > 1)
        by_head = call.counts.shape[1] > 1 or (call.key_order is not None and len(call.key_order) > 1)
        name = b if by_batch else 0, head if by_head else 0
        if name not in self.kept:
            self.kept = {name: list(_head(call, b, head, sides).groups())}  # the last ones only
        return self.kept[name]


def _hides(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where True, -inf where False: adding is faster than filling by a mask."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -INF)


def _pool(call: Call) -> Tensor | None:
    """The mask tiles and an all-visible one at the end, as what is added to logits; as bool where that is too large."""
    if call.tiles is None:
        return None
    tiles = torch.cat([call.tiles, torch.ones_like(call.tiles[:1])])
    return _hides(tiles, call.dtype) if tiles.numel() <= POOL_ELEMENTS else tiles


def _gather(blocks: Tensor, group: _Group, buffers: _Buffers, name: str) -> Tensor:
    """The group's key blocks side by side, [G, length * block_k, D]."""
    into = buffers.get(name, group.blocks.numel(), *blocks.shape[1:])
    torch.index_select(blocks, 0, group.blocks.flatten(), out=into)
    return into.view(len(group.blocks), -1, blocks.shape[2])


def _logits(
    q: Tensor, k: Tensor, group: _Group, buffers: _Buffers, pool: Tensor | None, factor: Tensor | None = None
) -> Tensor:
    """[G, block_q, length * block_k] of q [G, block_q, D], scaled, and gathered keys; -inf where not visible.

    factor: per pair of blocks [G, length], for 8-bit rows.
    """
    s = torch.bmm(q, k.transpose(1, 2), out=buffers.get("logits", q.shape[0], q.shape[1], k.shape[1]))
    if factor is not None:
        s.unflatten(2, (group.length, -1)).mul_(factor[:, None, :, None])
    if group.keys is not None:
        s.add_(group.keys)
    if group.tiles is not None and pool is not None:
        number = group.tiles.flatten()
        if pool.dtype == torch.bool:
            hides = _hides(pool.index_select(0, number), s.dtype)
        else:
            hides = buffers.get("tiles", len(number), *pool.shape[1:])
            torch.index_select(pool, 0, number, out=hides)
        s.unflatten(2, (group.length, -1)).transpose(1, 2).add_(hides.unflatten(0, group.tiles.shape))
    if group.late is not None:
        s.masked_fill_(group.late, -INF)
    return s


def _exp(s: Tensor, masked: bool, bounded: bool = False) -> Tensor:
    """exp in place, of logits minus their row's maximum or lse, or of bounded ones as they are.

    MKL's exp takes fifty times as long where a result underflows as elsewhere: such logits are raised first and their
    weights set to 0 afterwards.
    """
    if s.dtype == torch.float32 and (masked or not (bounded or float(s.amin()) >= FLOOR)):
        return torch.threshold_(s.clamp_(min=FLOOR).exp_(), TINY, 0.0)
    return s.exp_()


def _dropped(s: Tensor, length: int, threshold: float, real: Tensor) -> Tensor:
    """bool [G, length]: blocks whose values don't count, for logits [G, block_q, length * block_k].

    real: bool [G, block_q], False for the rows beyond the end, which have no say.
    """
    tops = s.unflatten(2, (length, -1)).amax(-1)
    counts = (tops + threshold >= tops.cummax(-1).values) & (tops > -INF) & real[:, :, None]
    return ~counts.any(1)


def _keys_and_values(
    call: Call, key: Tensor, b: int, head_kv: int, side: _Side, buffers: _Buffers
) -> tuple[Tensor, Tensor]:
    """One head's key and value blocks; what key_mask hides is 0, so that nothing leaks out of padding."""
    found = []
    for name, rows in (("keys", key), ("values", call.value)):
        blocks = side.cut(rows[b, :, head_kv], call.dtype, buffers, name)
        if call.key_mask is not None:
            hidden = ~side.cut(call.key_mask[b if len(call.key_mask) > 1 else 0], torch.bool)
            blocks.masked_fill_(hidden[..., None], 0.0)
        found.append(blocks)
    return found[0], found[1]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, Dv] in query's dtype and lse [B, Nq, H]."""
    batch, num_queries, heads, _ = call.query.shape
    heads_kv, dim_v = call.value.shape[2:]
    out = call.query.new_empty(batch, num_queries, heads, dim_v)
    lse = call.query.new_empty(batch, num_queries, heads, dtype=call.dtype)
    buffers, pool, lists = _Buffers(call.dtype), _pool(call), _Lists(call)
    holes = bool((call.counts == 0).any())
    int8 = call.query_int8 is not None
    plain, longest = not int8 and call.skip_threshold is None, call.query
    query, key = (call.query, call.key) if call.query_int8 is None else (call.query_int8, call.key_int8)
    assert key is not None
    blocks_k = blocks_v = call.key
    for b in range(batch):
        for head in range(heads):
            head_kv = head // (heads // heads_kv)
            queries, keys = sides = _sides(call, head)
            if head % (heads // heads_kv) == 0:
                blocks_k, blocks_v = _keys_and_values(call, key, b, head_kv, keys, buffers)
                longest = blocks_k.norm(dim=-1).max() if plain else longest
            blocks_q = queries.cut(query[b, :, head], call.dtype, buffers, "queries")
            real = (queries.tokens() < num_queries) if call.skip_threshold is not None else None
            if not int8:
                blocks_q.mul_(call.scale)
            bounded = plain and bool(blocks_q.norm(dim=-1).max() * longest <= BOUND)
            made = queries.room(out[b, :, head], call.dtype, 0.0 if holes else None)
            totals = queries.room(lse[b, :, head], call.dtype, -INF if holes else None)
            for group in lists.groups(b, head, sides):
                factor = None
                if call.query_scale is not None and call.key_scale is not None:
                    own = call.query_scale[b, head][group.rows] * call.scale
                    factor = own[:, None] * call.key_scale[b, head_kv][group.blocks]
                k = _gather(blocks_k, group, buffers, "listed keys")
                s = _logits(blocks_q[group.rows], k, group, buffers, pool, factor)
                dropped = None
                if call.skip_threshold is not None and real is not None:
                    dropped = _dropped(s, group.length, call.skip_threshold, real[group.rows])
                top: Tensor | None = None
                if not bounded:
                    top = s.amax(-1, keepdim=True)
                    s.sub_(top.masked_fill_(top == -INF, 0.0) if group.masked else top)
                _exp(s, group.masked, bounded)
                total = s.sum(-1, keepdim=True)
                if dropped is not None:
                    s.unflatten(2, (group.length, -1)).masked_fill_(dropped[:, None, :, None], 0.0)
                o = torch.bmm(s, _gather(blocks_v, group, buffers, "listed values"))
                safe = total.masked_fill(total == 0, 1.0) if group.masked else total
                if isinstance(group.rows, slice):
                    torch.div(o, safe, out=made[group.rows])
                else:
                    made[group.rows] = o.div_(safe)
                total.log_()
                totals[group.rows] = (total if top is None else total.add_(top)).squeeze(-1)
            queries.put(out[b, :, head], made)
            queries.put(lse[b, :, head], totals)
    return out, lse


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key and value that `needs` asks for; the formula is the reference's."""
    heads, heads_kv = call.query.shape[2], call.value.shape[2]
    repeats = heads // heads_kv
    found = [torch.empty(t.shape, dtype=t.dtype) if n else None for t, n in zip(call[:3], needs)]
    buffers, pool, lists = _Buffers(call.dtype), _pool(call), _Lists(call)
    safe_lse = lse.masked_fill(lse == -INF, 0.0)
    delta = (grad_out.to(call.dtype) * out.to(call.dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(call.dtype)
    blocks_k = blocks_v = grad_k = grad_v = call.key
    for b in range(call.query.shape[0]):
        for head in range(heads):
            head_kv = head // repeats
            queries, keys = sides = _sides(call, head)
            if head % repeats == 0:
                blocks_k, blocks_v = _keys_and_values(call, call.key, b, head_kv, keys, buffers)
                grad_k, grad_v = (torch.zeros(t.shape, dtype=call.dtype) for t in (blocks_k, blocks_v))
            blocks_q = queries.cut(call.query[b, :, head], call.dtype, buffers, "queries").mul_(call.scale)
            grads = queries.cut(grad_out[b, :, head], call.dtype, buffers, "grads")
            own_lse = queries.cut(safe_lse[b, :, head], call.dtype)
            own_delta = queries.cut(delta[b, :, head], call.dtype)
            grad_q = torch.zeros_like(blocks_q)
            for group in lists.groups(b, head, sides):
                q, k = blocks_q[group.rows], _gather(blocks_k, group, buffers, "listed keys")
                p = _logits(q, k, group, buffers, pool)
                _exp(p.sub_(own_lse[group.rows][:, :, None]), group.masked)
                do, listed = grads[group.rows], group.blocks.flatten()
                if needs[2]:
                    dv = torch.bmm(p.transpose(1, 2), do)
                    grad_v.index_add_(0, listed, dv.view(-1, *blocks_v.shape[1:]))
                if needs[0] or needs[1]:
                    v = _gather(blocks_v, group, buffers, "listed values")
                    ds = torch.bmm(do, v.transpose(1, 2), out=buffers.get("slopes", *p.shape))
                    ds.sub_(own_delta[group.rows][:, :, None]).mul_(p)
                    if needs[0]:
                        grad_q[group.rows] = torch.bmm(ds, k)
                    if needs[1]:
                        dk = torch.bmm(ds.transpose(1, 2), q)
                        grad_k.index_add_(0, listed, dk.view(-1, *blocks_k.shape[1:]))
            if found[0] is not None:
                queries.put(found[0][b, :, head], grad_q.mul_(call.scale))
            if head % repeats == repeats - 1:
                for whole, part in ((found[1], grad_k), (found[2], grad_v)):
                    if whole is not None:
                        keys.put(whole[b, :, head_kv], part)
    return found[0], found[1], found[2]
