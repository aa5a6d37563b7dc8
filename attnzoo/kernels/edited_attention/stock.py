"""Unedited rows, by PyTorch's own fused kernel, without a mask over all rows and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.kernels.edited_attention.problem import MASK_ELEMENTS, Visibility
from attnzoo.kernels.edited_attention.reference import visible


def rows(query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """Plain attention of all of query's rows, [B, R, H, Dv], by F.scaled_dot_product_attention.

    Where the visibility can't be said by is_causal, masks of at most MASK_ELEMENTS entries (or one row) are made, some
    rows at a time. A mask that the caller gave is cut, not copied, unless something must be added to it.
    """
    num_rows, num_keys, offset = query.shape[1], key.shape[1], visibility.query_offset
    assert offset is not None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    repeated = q.shape[1] != k.shape[1]
    free = visibility.key_mask is None and visibility.mask is None and visibility.window_size is None
    if free and not visibility.is_causal:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=repeated).transpose(1, 2)
    if free and visibility.span_ids is None and offset == 0 and num_rows <= num_keys:
        k, v = k[:, :, :num_rows], v[:, :, :num_rows]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=repeated)
        return out.transpose(1, 2)
    parts = []
    step = max(1, MASK_ELEMENTS // max(1, q.shape[0] * num_keys))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        part = visibility.rows(start, stop)
        high = num_keys
        if visibility.is_causal and visibility.span_ids is None:
            high = min(num_keys, max(0, offset + stop))
        allowed = visible(part, stop - start, num_keys, q.device)
        if part.mask is not None and part.mask.dtype != torch.bool:
            added = part.mask.to(q.dtype)
            allowed = added if allowed is None else added.masked_fill(~allowed, float("-inf"))
        mask = None if allowed is None else allowed[..., :high]
        some = q[:, :, start:stop], k[:, :, :high], v[:, :, :high]
        parts.append(F.scaled_dot_product_attention(*some, attn_mask=mask, scale=scale, enable_gqa=repeated))
    return torch.cat(parts, 2).transpose(1, 2) if len(parts) > 1 else parts[0].transpose(1, 2)
