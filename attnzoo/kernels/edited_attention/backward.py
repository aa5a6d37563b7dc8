"""Gradients on any device, by recomputing the probabilities of a block of rows from group_lse.

With z the edited logits, P_j = exp(z_j - lse_g) for a key j of group g, and (dO_g, dL_g) what arrives for that group:

    dz_j = P_j (dO_g . v_j - dO_g . O_g + dL_g)        dv_j += P_j dO_g
    ds = dz / temperature;  dmask += ds;  dbias += ds;  dboost += ds |s|
    da = ds (1 + boost sign(s)) (1 - (s / softcap)^2);  dq += scale da k;  dk += scale da q
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.edited_attention.blocks import INF, Block, blocks, cap, edit
from attnzoo.kernels.edited_attention.problem import Edits, Visibility
from attnzoo.kernels.edited_attention.reference import statistics_dtype


def _add_over_rows(total: Tensor, block: Block, part: Tensor, keys: slice) -> None:
    """Add part [kv heads, repeats, rows, n], summed over its rows, to total [B or 1, H or 1, Nk]."""
    summed = part.sum(2).flatten(0, 1)
    own = total[block.batch if total.shape[0] > 1 else 0]
    if own.shape[0] == 1:
        own[0, keys].add_(summed.sum(0))
    else:
        own[block.where[2], keys].add_(summed)


def _add_mask(total: Tensor, block: Block, part: Tensor, keys: slice) -> None:
    """Add part [kv heads, repeats, rows, n] to total [B or 1, H or 1, R, Nk]."""
    part = part.flatten(0, 1)
    own = total[block.batch if total.shape[0] > 1 else 0]
    if own.shape[0] == 1:
        own[0, block.start : block.stop, keys].add_(part.sum(0))
    else:
        own[block.where[2], block.start : block.stop, keys].add_(part)


def gradients(
    grads: tuple[Tensor | None, Tensor | None],
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    visibility: Visibility,
    edits: Edits,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """Gradients of query, key, value, key_bias, boost and mask, those that `needs` names, in their dtypes.

    grads: of group_output and group_lse, None for zero. tensors: query, key, value. results: group_output, group_lse.
    """
    query, key, value = tensors
    output, group_lse = results
    dtype = statistics_dtype(query.dtype)
    wanted: dict[str, Tensor | None] = {"query": query, "key": key, "value": value}
    wanted |= {"key_bias": edits.key_bias, "boost": edits.boost, "mask": visibility.mask}
    found = {
        n: torch.zeros(t.shape, dtype=dtype, device=t.device) for n, t in wanted.items() if needs[n] and t is not None
    }
    grad_output = torch.zeros_like(output, dtype=dtype) if grads[0] is None else grads[0].to(dtype)
    grad_lse = torch.zeros_like(group_lse) if grads[1] is None else grads[1].to(dtype)
    grad_lse = grad_lse.masked_fill(group_lse == -INF, 0.0) - (grad_output * output.to(dtype)).sum(-1)
    safe_lse = group_lse.masked_fill(group_lse == -INF, 0.0)
    num_keys = key.shape[1]
    for block in blocks(query, key, visibility, 4):
        heads, keys = slice(block.first, block.last), slice(block.low, block.high)
        k = key[block.batch, keys, heads].to(dtype).transpose(0, 1)
        v = value[block.batch, keys, heads].to(dtype).transpose(0, 1)
        rows = block.fold(query, dtype)
        apart = (block.repeats, -1)
        capped = cap(torch.bmm(rows * edits.scale, k.transpose(1, 2)), edits).unflatten(1, apart)
        z = edit(capped.clone(), block, keys, visibility, edits, num_keys)
        dz = torch.zeros_like(z)
        for group in range(edits.num_groups):
            lse = block.fold(safe_lse[..., group, None], dtype).unflatten(1, apart)
            p = torch.exp(z - lse)
            if edits.groups is not None:
                p.masked_fill_(block.of_heads(edits.groups)[..., None, keys] != group, 0.0)
            do = block.fold(grad_output[..., group, :], dtype)
            if needs["value"]:
                dv = torch.bmm(p.flatten(1, 2).transpose(1, 2), do)
                found["value"][block.batch, keys, heads].add_(dv.transpose(0, 1))
            dp = torch.bmm(do, v.transpose(1, 2)).unflatten(1, apart)
            dp += block.fold(grad_lse[..., group, None], dtype).unflatten(1, apart)
            dz += p * dp
        ds = dz.div_(edits.temperature)
        if needs["mask"]:
            _add_mask(found["mask"], block, ds, keys)
        if needs["key_bias"]:
            _add_over_rows(found["key_bias"], block, ds, keys)
        if needs["boost"]:
            _add_over_rows(found["boost"], block, ds * capped.abs(), keys)
        if edits.boost is not None:
            ds.mul_(1 + block.of_heads(edits.boost)[..., None, keys].to(dtype) * capped.sign())
        if edits.softcap is not None:
            ds.mul_(1 - (capped / edits.softcap).square_())
        da = ds.mul_(edits.scale).flatten(1, 2)
        if needs["query"]:
            found["query"][block.where].add_(block.unfold(torch.bmm(da, k)))
        if needs["key"]:
            found["key"][block.batch, keys, heads].add_(torch.bmm(da.transpose(1, 2), rows).transpose(0, 1))
    return {n: gradient.to(tensor.dtype) for n, gradient in found.items() if (tensor := wanted[n]) is not None}
