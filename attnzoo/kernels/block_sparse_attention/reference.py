"""The formula, over all pairs of tokens: any device, any dtype, the yardstick of the other back ends.

Everything happens along the orders (query and key rows are permuted first, results put back last). With s the scaled
logits, -inf where a pair is not visible, top the row's maximum, e = exp(s - top):

    out = (e * kept) @ value / sum(e)        lse = log(sum(e)) + top

kept is 1 without skip_threshold. With it, it is 0 for the blocks that `keeps` says: they lose their values and not
their mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.block_sparse_attention.orders import in_order, inverse
from attnzoo.kernels.block_sparse_attention.problem import Call
from attnzoo.kernels.edited_attention.reference import softmax_parts

INF = float("inf")


def _rows(tensor: Tensor, order: Tensor | None, dtype: torch.dtype, heads: int) -> Tensor:
    """[B, N, heads of its own, D] as [B, heads, N, D] along the order."""
    rows = in_order(tensor.to(dtype).transpose(1, 2), order)
    return rows.repeat_interleave(heads // rows.shape[1], 1)


def _real(call: Call, rows: Tensor) -> Tensor:
    """Rows [B, Nk, ...] with 0 where key_mask hides them, so that nothing leaks out of padding."""
    return rows if call.key_mask is None else rows.masked_fill(~call.key_mask[:, :, None, None], 0.0)


def visible(call: Call) -> Tensor:
    """bool [B or 1, H or 1, Nq, Nk] along the orders: which keys a query sees."""
    seen = call.sparsity.element_mask()
    num_queries, num_keys, heads = call.query.shape[1], call.key.shape[1], call.query.shape[2]
    device = call.query.device

    def along(flag: Tensor) -> Tensor:  # [B, 1, Nk] of the tokens as they stand, per head where orders are
        own = 1 if call.key_order is None else len(call.key_order)
        found = in_order(flag.expand(-1, own, -1), call.key_order)
        return found.repeat_interleave(heads // own, 1) if own > 1 else found

    if call.key_mask is not None:
        seen = seen & along(call.key_mask[:, None])[:, :, None, :]
    if call.is_causal:
        places = torch.arange(num_queries, device=device)[None] if call.query_order is None else call.query_order
        keys = along(torch.arange(num_keys, device=device)[None, None])
        seen = seen & (keys[:, :, None, :] <= places[None, :, :, None] + num_keys - num_queries)
    return seen


def logits(call: Call) -> Tensor:
    """[B, H, Nq, Nk] along the orders, -inf where a pair is not visible."""
    heads = call.query.shape[2]
    if call.query_int8 is None or call.key_int8 is None or call.query_scale is None or call.key_scale is None:
        q = _rows(call.query, call.query_order, call.dtype, heads)
        s = (q * call.scale) @ _rows(call.key, call.key_order, call.dtype, heads).transpose(2, 3)
    else:
        q = _rows(call.query_int8, call.query_order, call.dtype, heads)
        s = q @ _rows(call.key_int8, call.key_order, call.dtype, heads).transpose(2, 3)  # exact below 2 ** 24
        of_keys = call.key_scale.repeat_interleave(heads // call.key_scale.shape[1], 1)
        of_keys = of_keys.repeat_interleave(call.block_k, 2)[:, :, None, : s.shape[3]]
        of_queries = call.query_scale.repeat_interleave(call.block_q, 2)[:, :, : s.shape[2], None]
        s = s * (of_queries * of_keys * call.scale)
    return s.masked_fill(~visible(call), -INF)


def keeps(call: Call, s: Tensor) -> Tensor:
    """bool [B, H, nq, nk]: listed blocks whose values count, of logits [B, H, Nq, Nk]; see the operation's contract."""
    assert call.skip_threshold is not None
    batch, heads, num_queries, _ = s.shape
    rows, columns = call.sparsity.num_blocks
    padded = torch.nn.functional.pad(s, (0, -s.shape[3] % call.block_k, 0, -num_queries % call.block_q), value=-INF)
    tops = padded.unflatten(3, (columns, -1)).amax(-1).unflatten(2, (rows, -1))  # [B, H, nq, block_q, nk]
    kept = torch.zeros(batch, heads, rows, columns + 1, dtype=torch.bool, device=s.device)
    running = torch.full(tops.shape[:4], -INF, dtype=s.dtype, device=s.device)
    for step in range(call.indices.shape[3]):
        listed = (step < call.counts).expand(batch, heads, rows)
        block = call.indices[..., step].long().expand(batch, heads, rows)
        top = tops.gather(4, block[..., None, None].expand(*tops.shape[:4], 1))[..., 0]
        top = top.masked_fill(~listed[..., None], -INF)
        running = torch.maximum(running, top)
        counts = ((top + call.skip_threshold >= running) & (top > -INF)).any(3)
        kept.scatter_(3, torch.where(listed, block, columns)[..., None], counts[..., None])
    return kept[..., :columns]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, Dv] in query's dtype and lse [B, Nq, H]."""
    s = logits(call)
    p, lse = softmax_parts(s)
    if call.skip_threshold is not None:
        kept = keeps(call, s).repeat_interleave(call.block_q, 2)[:, :, : s.shape[2]]
        p = p * kept.repeat_interleave(call.block_k, 3)[..., : s.shape[3]]
    out = p @ _rows(_real(call, call.value), call.key_order, call.dtype, s.shape[1])
    back = inverse(call.query_order)
    return (
        in_order(out, back).transpose(1, 2).to(call.query.dtype).contiguous(),
        in_order(lse, back).transpose(1, 2).contiguous(),
    )


def backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key and value that `needs` asks for.

    With p = exp(s - lse): ds = p * (<grad_out, value> - <grad_out, out> + grad_lse).
    """
    heads, heads_kv = call.query.shape[2], call.key.shape[2]
    grad = _rows(grad_out, call.query_order, call.dtype, heads)
    delta = (grad * _rows(out, call.query_order, call.dtype, heads)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - _rows(grad_lse[..., None], call.query_order, call.dtype, heads)
    total = _rows(lse[..., None], call.query_order, call.dtype, heads)
    p = torch.exp(logits(call) - total.masked_fill(total == -INF, 0.0))
    q = _rows(call.query, call.query_order, call.dtype, heads)
    k, v = (_rows(_real(call, t), call.key_order, call.dtype, heads) for t in (call.key, call.value))
    ds = p * (grad @ v.transpose(2, 3) - delta) * call.scale

    def back(rows: Tensor, own: int, order: Tensor | None, like: Tensor) -> Tensor:
        summed = rows.unflatten(1, (own, -1)).sum(2)
        return in_order(summed, inverse(order)).transpose(1, 2).to(like.dtype).contiguous()

    return (
        back(ds @ k, heads, call.query_order, call.query) if needs[0] else None,
        back(ds.transpose(2, 3) @ q, heads_kv, call.key_order, call.key) if needs[1] else None,
        back(p.transpose(2, 3) @ grad, heads_kv, call.key_order, call.value) if needs[2] else None,
    )
