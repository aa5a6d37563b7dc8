"""Attention over listed blocks of keys, per head; the rest of the matrix is neither formed nor read.

Layout: query [B, Nq, H, D], key [B, Nk, Hkv, D], value [B, Nk, Hkv, Dv], H a multiple of Hkv. A `BlockSparsity` says
which blocks of keys every block of queries attends to, made from a block mask, from lists, or from a mask function over
grid coordinates; blocks that are visible in part carry a mask tile, so that any mask can be said exactly.

    s = q . k * scale,  -inf where the pair is not visible
    out = softmax(s) @ value,  lse = log(sum(exp(s)))

Visible is a pair whose block is listed, whose bit in the block's tile is set (where it has one), whose key is True in
key_mask and, with is_causal, no later than the query: key j <= query i + Nk - Nq, both as the tokens stand.

Sources: SpargeAttn (Zhang et al., ICML 2025; code bfd980b) for the lists, the skip threshold and the 8-bit path;
PAROAttention (2025) for orders; Dao, FlashAttention-2 (2023), for the walk. The selection rules that make the lists
(SpargeAttn, AdaSpa, PAROAttention) are methods, not part of this operation.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.kernels.block_sparse_attention.operator import attend
from attnzoo.kernels.block_sparse_attention.orders import axis_order, tile_order
from attnzoo.kernels.block_sparse_attention.problem import check
from attnzoo.kernels.block_sparse_attention.sparsity import BlockSparsity, Lists

__all__ = ["BlockSparsity", "Lists", "axis_order", "block_sparse_attention", "tile_order"]


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparsity: BlockSparsity,
    scale: float | None = None,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    query_order: Tensor | None = None,
    key_order: Tensor | None = None,
    skip_threshold: float | None = None,
    qk_int8: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys of its block's listed blocks.

    query [B, Nq, H, D], key [B, Nk, Hkv, D], value [B, Nk, Hkv, Dv]: float32, bfloat16, float16, or float64 (on the
        CPU and the reference); read through their strides.
    sparsity: for Nq and Nk tokens; its batch and heads are those of query, or 1.
    scale: of the dot products; None means D ** -0.5, and 0.0 is 0.0.
    key_mask: [B or 1, Nk] bool, False for padding, which nobody sees.
    is_causal: see the module's text. Listed blocks beyond the diagonal are read and masked: better not listed.
    query_order, key_order: orders along which the sparsity's blocks are cut, [N] or per head ([H, Nq], [Hkv, Nk]), for
        a sparsity that holds none; checked here at every call, while those that it holds were checked when it was made.
        Results come back where the tokens stand.
    skip_threshold: in units of the logits, above 0. While a query block walks its list in order, every row keeps the
        largest logit so far, the block's own included. A listed block whose largest logit lies more than skip_threshold
        below it, in every row of the query block that sees a key of it, loses its values: its mass stays in the
        denominator and in lse, as in SpargeAttn, so that lse is exact and |out - exact| <= (mass skipped) max |value|.
        What is skipped depends on the order of the lists, and on nothing else; rows of other query blocks have no say.
    qk_int8: 8-bit queries and keys, one scale per block, keys minus their mean, see `quantise`; the products with the
        values are in value's dtype. lse is that of the keys as they are, up to the rounding.
    return_lse: also return the natural logarithm of the softmax's denominator.
    backend: "auto", "reference", "tiled" (CPU), "flex" or "triton"; it changes speed, not meaning.

    Returns out [B, Nq, H, Dv], contiguous, in query's dtype, and with return_lse lse [B, Nq, H] in float32 (float64 for
    float64 inputs), differentiable too. A query without visible keys has out 0, lse -inf and gradients 0.
    Under autocast query, key and value are cast.

    Raises TypeError, ValueError for arguments that don't fit; UnsupportedError where the asked back end can't serve,
    for a gradient through skip_threshold or qk_int8, and for double backward.
    """
    arguments = check(
        query,
        key,
        value,
        sparsity,
        scale,
        key_mask=key_mask,
        is_causal=is_causal,
        query_order=query_order,
        key_order=key_order,
        skip_threshold=skip_threshold,
        qk_int8=qk_int8,
        return_lse=return_lse,
    )
    out, lse = attend(arguments, backend)
    return out if lse is None else (out, lse)
