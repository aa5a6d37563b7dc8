"""The CPU path: a few rows at a time, dense over the keys that they can see.

At most SCORE_ELEMENTS logits live at once, but never less than one row of one kv head. Key groups: for few rows
(decode) each group's logits are masked out of the one score block and the values are read once; for many rows, with
groups that all heads share, keys and values are first gathered group by group (one copy of them), and no product is
computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention.blocks import INF, Block, Keys, blocks, cap, edit
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.reference import statistics_dtype

GATHER_FROM_ROWS = 32
SMALLEST_MASS = 1e-20


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of s [..., n] and its lse [...], 0 and -inf for a row of -inf.

    torch.softmax takes a quarter of the time of torch.exp. Its largest entry is 1 / total, which gives the lse.
    """
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -INF)
    top = s.amax(-1)
    p = torch.softmax(s, -1)
    empty = top == -INF
    if empty.any():
        p.masked_fill_(empty[..., None], 0.0)
        return p, torch.where(empty, -INF, top - p.amax(-1).log_())
    return p, top.sub_(p.amax(-1).log_())


def _attend(s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(s) @ v and lse for s [heads, M, n], v [heads, n, Dv]."""
    p, lse = _softmax(s)
    return torch.bmm(p, v), lse


def _split(s: Tensor, v: Tensor, ids: Tensor, block: Block, num_groups: int) -> tuple[Tensor, Tensor]:
    """Every group's softmax from one block of logits: output [rows, heads, G, Dv], lse [rows, heads, G].

    s [kv heads, repeats, rows, n]; ids, the keys' groups, [kv heads or 1, repeats or 1, 1, n]. The softmax of all
    groups, cut into groups, serves them all, unless a group's mass comes near to what float32 can't hold.
    """
    group = torch.arange(num_groups, device=s.device, dtype=torch.uint8).view(-1, 1, 1, 1)
    member = ids.unsqueeze(1) == group
    p, lse = _softmax(s)
    own = p.unsqueeze(1) * member
    mass = own.sum(-1)
    tiny = mass < SMALLEST_MASS
    if tiny.any():
        seen = (member & (s != -INF).unsqueeze(1)).any(-1)
        if (tiny & seen).any():
            own, lse = _softmax(s.unsqueeze(1).masked_fill(~member, -INF))
            mass = own.new_ones(())
        else:
            mass.masked_fill_(tiny, 1.0)
            lse = torch.where(seen, lse.unsqueeze(1) + mass.log(), -INF)
    else:
        lse = lse.unsqueeze(1) + mass.log()
    shape = (num_groups, block.repeats, block.num_rows)
    output = torch.bmm(own.flatten(1, 3), v).unflatten(1, shape)
    if mass.ndim:
        output /= mass.unsqueeze(-1)
    return output.permute(3, 0, 2, 1, 4).flatten(1, 2), lse.permute(3, 0, 2, 1).flatten(1, 2)


def grouped(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, edits: Edits) -> tuple[Tensor, Tensor]:
    """group_output [B, R, H, G, Dv] in query's dtype and group_lse [B, R, H, G] of all of query's rows."""
    dtype = statistics_dtype(query.dtype)
    num_keys, num_heads_kv = key.shape[1:3]
    shape = (*query.shape[:3], edits.num_groups)
    output = query.new_empty((*shape, value.shape[3]))
    group_lse = query.new_empty(shape, dtype=dtype)
    folded_rows = query.shape[1] * query.shape[2] // num_heads_kv
    gather = edits.groups is not None and edits.groups.shape[1] == 1 and folded_rows >= GATHER_FROM_ROWS
    kept: tuple[int, int] | None = None
    k = v = key
    members: list[tuple[Tensor, Tensor, Tensor]] = []
    for block in blocks(query, key, visibility, 1 if gather else edits.num_groups):
        if kept != (block.batch, block.first):
            kept, heads = (block.batch, block.first), slice(block.first, block.last)
            k = key[block.batch, :, heads].to(dtype).transpose(0, 1)
            v = value[block.batch, :, heads].to(dtype).transpose(0, 1)
            if gather and edits.groups is not None:
                ids = edits.groups[block.batch if edits.groups.shape[0] > 1 else 0, 0]
                found = [(ids == group).nonzero().squeeze(1) for group in range(edits.num_groups)]
                members = [(places, k[:, places], v[:, places]) for places in found]
        rows = block.fold(query, dtype) * edits.scale

        def edited(own_keys: Tensor, keys: Keys, rows: Tensor = rows, block: Block = block) -> Tensor:
            s = cap(torch.bmm(rows, own_keys.transpose(1, 2)), edits).unflatten(1, (block.repeats, -1))
            return edit(s, block, keys, visibility, edits, num_keys)

        if gather:
            for group, (places, own_k, own_v) in enumerate(members):
                low, high = torch.searchsorted(places, torch.tensor([block.low, block.high])).tolist()
                o, lse = _attend(edited(own_k[:, low:high], places[low:high]).flatten(1, 2), own_v[:, low:high])
                output[block.where][:, :, group] = block.unfold(o)
                group_lse[block.where][:, :, group] = block.unfold(lse)
            continue
        keys = slice(block.low, block.high)
        s = edited(k[:, keys], keys)
        if edits.groups is None:
            o, lse = _attend(s.flatten(1, 2), v[:, keys])
            output[block.where][:, :, 0] = block.unfold(o)
            group_lse[block.where][:, :, 0] = block.unfold(lse)
        else:
            ids = block.of_heads(edits.groups)[..., None, keys]
            output[block.where], group_lse[block.where] = _split(s, v[:, keys], ids, block, edits.num_groups)
    return output, group_lse


def _softmax_blocks(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits) -> Iterator[tuple[Block, Tensor]]:
    """(block, softmax [kv heads, repeats * rows, n]) of every block of rows."""
    dtype = statistics_dtype(query.dtype)
    for block in blocks(query, key, visibility):
        keys = slice(block.low, block.high)
        k = key[block.batch, keys, block.first : block.last].to(dtype).transpose(0, 1)
        s = cap(torch.bmm(block.fold(query, dtype) * edits.scale, k.transpose(1, 2)), edits)
        s = edit(s.unflatten(1, (block.repeats, -1)), block, keys, visibility, edits, key.shape[1]).flatten(1, 2)
        yield block, _softmax(s)[0]


def column_sums(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits) -> Tensor:
    """The softmax summed over all of query's rows, [B, H, Nk], a block of rows at a time."""
    batch, _, num_heads, _ = query.shape
    sums = query.new_zeros((batch, num_heads, key.shape[1]), dtype=statistics_dtype(query.dtype))
    for block, p in _softmax_blocks(query, key, visibility, edits):
        of_heads = p.unflatten(1, (block.repeats, -1)).sum(2).flatten(0, 1)
        sums[block.batch, block.where[2], block.low : block.high].add_(of_heads)
    return sums


def probs(query: Tensor, key: Tensor, visibility: Visibility, edits: Edits, head_reduction: str) -> Tensor:
    """The softmax of all of query's rows, [B, R, H, Nk]; [B, R, Nk] for head_reduction "max" or "mean"."""
    batch, num_rows, num_heads, _ = query.shape
    reduced = head_reduction != "none"
    shape = (batch, num_rows, key.shape[1]) if reduced else (batch, num_rows, num_heads, key.shape[1])
    found = query.new_zeros(shape, dtype=statistics_dtype(query.dtype))
    for block, folded in _softmax_blocks(query, key, visibility, edits):
        p = block.unfold(folded)
        of_rows = found[block.batch, block.start : block.stop, ..., block.low : block.high]
        if not reduced:
            of_rows[:, block.where[2]] = p
        elif head_reduction == "max":
            torch.maximum(of_rows, p.amax(1), out=of_rows)
        else:
            of_rows.add_(p.sum(1), alpha=1 / num_heads)
    return found


def regrouped(
    probs: Tensor, value: Tensor, groups: Tensor, num_groups: int, rule: Tensor | Callable, renormalise: bool
) -> Tensor:
    """Few rows, re-weighted before the values are read: one product with them instead of one per group.

    probs [B, R, H, Nk], 0 for keys in no group; groups [B or 1, 1, Nk]. Returns [B, R, H, Dv] in probs' dtype.
    """
    batch, num_rows, num_heads, num_keys = probs.shape
    p = probs.transpose(1, 2)
    member = (groups.unsqueeze(2) == torch.arange(num_groups, dtype=torch.uint8)[:, None]).to(p.dtype)
    masses = (p @ member.transpose(2, 3)).transpose(1, 2)
    factors = (rule if isinstance(rule, Tensor) else rule(masses)).to(p.dtype).expand(masses.shape)
    if renormalise:
        total = (factors * masses).sum(-1, keepdim=True)
        factors = factors / torch.where(total == 0, 1.0, total)
    weights = p * (factors.transpose(1, 2) @ member)
    weights = weights.reshape(batch, value.shape[2], -1, num_keys)
    rows = [torch.bmm(w, v.to(p.dtype).transpose(0, 1)) for w, v in zip(weights, value)]
    return torch.stack(rows).reshape(batch, num_heads, num_rows, -1).transpose(1, 2)
