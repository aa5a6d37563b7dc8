"""8-bit queries and keys: keys minus their mean, one scale per block, the same numbers for every back end.

With mu the mean over the tokens of the keys (those that key_mask leaves), q . k = q . (k - mu) + q . mu, and the second
part is the same for all keys of a query: it leaves the softmax alone and adds to lse. What is quantised is k - mu,
which has no outliers common to all tokens. A block's scale is its largest magnitude / 127, a block being block_q or
block_k tokens of one head along the order; values are rounded to the nearest, ties to even.

    logit = (int8 q . int8 k, summed in integers) * query scale * key scale * scale

Source: SageAttention (Zhang et al., 2024), section 3.2; SpargeAttn bfd980b quantises so after its selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.kernels.block_sparse_attention.orders import in_order, inverse
from attnzoo.kernels.block_sparse_attention.sparsity import BlockSparsity
from attnzoo.kernels.edited_attention.reference import statistics_dtype


def _by_blocks(rows: Tensor, order: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """int8 [B, N, heads, D], where the tokens stand, and scales [B, heads, blocks], of rows [B, N, heads, D]."""
    num_tokens = rows.shape[1]
    largest = in_order(rows.abs().amax(-1).transpose(1, 2), order)
    largest = torch.nn.functional.pad(largest, (0, -num_tokens % block)).unflatten(2, (-1, block)).amax(-1)
    scales = torch.where(largest == 0, 1.0, largest / 127)
    per_token = in_order(scales.repeat_interleave(block, 2)[..., :num_tokens], inverse(order))
    return (rows / per_token.transpose(1, 2)[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales


def quantise(
    query: Tensor, key: Tensor, key_mask: Tensor | None, sparsity: BlockSparsity
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """((query_int8, key_int8, query_scale [B, H, nq], key_scale [B, Hkv, nk]), what q . mu is [B, Nq, H], unscaled)."""
    dtype = statistics_dtype(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        q, k = query.to(dtype), key.to(dtype)
        if key_mask is None:
            mean = k.mean(1)
        else:
            seen = key_mask[:, :, None, None]
            mean = k.masked_fill(~seen, 0.0).sum(1) / seen.sum(1).clamp(min=1)
        k = k - mean[:, None]
        if key_mask is not None:
            k = k.masked_fill(~key_mask[:, :, None, None], 0.0)
        repeats = query.shape[2] // key.shape[2]
        shift = (q * mean.repeat_interleave(repeats, 1)[:, None]).sum(-1)
        (q8, q_scale), (k8, k_scale) = (
            _by_blocks(rows, order, block)
            for rows, order, block in zip((q, k), (sparsity.query_order, sparsity.key_order), sparsity.block_size)
        )
    return (q8, k8, q_scale, k_scale), shift
